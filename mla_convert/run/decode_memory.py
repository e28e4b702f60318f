"""What decoding a rollout and encoding its source hold, counted before: on the meta device, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..distill.encode.streaming import StreamingEncoder
from .decode import StreamingDecoder


class DecodingBytes(NamedTuple):
    """`kept`: bytes that a stream's features take between chunks; `working`: what the VAE takes while it runs.

    Streams are decoded one after another, so `streams` of them take `total(streams)` at most, beside the VAE's weights
    and what the libraries of a device ask for themselves. The same is said of encoding.
    """

    kept: int
    working: int

    def total(self, streams: int) -> int:
        return streams * self.kept + self.working


_NOTHING = DecodingBytes(0, 0)


def decoding_bytes(vae: Any, height: int, width: int) -> DecodingBytes:
    """Of decoding latents of `height x width` chunk by chunk with `vae`, an `AutoencoderKLWan`, in its dtype."""
    decoder = StreamingDecoder(_twin(vae))
    latent = torch.empty(1, vae.config.z_dim, 1, height, width, device="meta")
    # The second frame is the first of four video frames, the third finds all features at their full size.
    return _counted(decoder, [latent, latent, latent])


def encoding_bytes(vae: Any, height: int, width: int) -> DecodingBytes:
    """Of encoding a video into such latents chunk by chunk, a latent frame at a time."""
    encoder, spatial = StreamingEncoder(_twin(vae)), vae.config.scale_factor_spatial
    first, *more = (
        torch.empty(1, 3, frames, height * spatial, width * spatial, device="meta")
        for frames in (1, encoder.temporal, encoder.temporal)
    )
    return _counted(encoder, [first, *more])


def _twin(vae: Any) -> Any:
    """The same VAE without data."""
    with torch.device("meta"):
        twin: Any = type(vae).from_config(vae.config).eval()
    # By torch's own method: that of diffusers warns of parts that want float32, of which this VAE has none.
    return nn.Module.to(twin, vae.dtype)


def _counted(coder: StreamingDecoder | StreamingEncoder, chunks: Sequence[Tensor]) -> DecodingBytes:
    *before, last = chunks
    for chunk in before:
        coder(chunk)
    kept = sum(x.untyped_storage().nbytes() for x in coder.kept())
    with _Live(coder.kept()) as live:
        coder(last)
    return DecodingBytes(kept, live.peak - kept)


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there, with `known` ones; `peak` is their most."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in known:
            self._take(tensor)

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self._take(one)
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


def reserve(
    models: Sequence[Any],
    vae: Any,
    height: int,
    width: int,
    streams: int,
    device: torch.device,
    encoder: Any = None,
) -> None:
    """Have `models` leave room for decoding on `device` when they decide how often histories are expanded.

    They do so in the first pass of a rollout, before the VAE has taken anything. Without a `vae` nothing is decoded.
    `encoder` is the VAE that encodes one source for all streams, before a chunk and not while another is decoded.
    """
    # No other device says how much of its memory is free.
    counts = device.type == "cuda"
    decoding = decoding_bytes(vae, height, width) if counts and vae is not None else _NOTHING
    encoding = encoding_bytes(encoder, height, width) if counts and encoder is not None else _NOTHING
    taken = streams * decoding.kept + encoding.kept + max(decoding.working, encoding.working)
    for model in models:
        if model.kernels is not None:
            model.kernels.leave_free(taken)
