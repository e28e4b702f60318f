"""Computes the memory for decoding a rollout and encoding its source, in advance on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..distill.encode.streaming import StreamingEncoder
from ..mla.model import StreamingModel
from .decode import StreamingDecoder


class VaeBytes(NamedTuple):
    """Bytes of decoding or encoding: `kept`, a stream's features between chunks; `working`, memory while the VAE runs.

    Streams are decoded one after another, so `streams` of them take at most `total(streams)`, plus the VAE's weights
    and the overhead of the device's libraries.
    """

    kept: int
    working: int

    def total(self, streams: int) -> int:
        return streams * self.kept + self.working


_NOTHING = VaeBytes(0, 0)


def decoding_bytes(vae: Any, height: int, width: int) -> VaeBytes:
    """Bytes of decoding latents of `height x width` chunk by chunk with `vae`, an `AutoencoderKLWan`, in its dtype."""
    decoder = StreamingDecoder(_twin(vae))
    latent = torch.empty(1, vae.config.z_dim, 1, height, width, device="meta")
    # The second frame is the first with four video frames; the third is the first with all features at full size.
    return _counted(decoder, [latent, latent, latent])


def encoding_bytes(vae: Any, height: int, width: int) -> VaeBytes:
    """Bytes of encoding a video to latents of `height x width` chunk by chunk, one latent frame at a time."""
    encoder, spatial = StreamingEncoder(_twin(vae)), vae.config.scale_factor_spatial
    first, *more = (
        torch.empty(1, 3, frames, height * spatial, width * spatial, device="meta")
        for frames in (1, encoder.temporal, encoder.temporal)
    )
    return _counted(encoder, [first, *more])


def _twin(vae: Any) -> Any:
    """The same VAE on the meta device."""
    with torch.device("meta"):
        twin: Any = type(vae).from_config(vae.config).eval()
    # torch's own method, because diffusers' one warns about modules to keep in float32, which this VAE lacks.
    return nn.Module.to(twin, vae.dtype)


def _counted(coder: StreamingDecoder | StreamingEncoder, chunks: Sequence[Tensor]) -> VaeBytes:
    *before, last = chunks
    for chunk in before:
        coder(chunk)
    kept = sum(x.untyped_storage().nbytes() for x in coder.kept())
    with _Live(coder.kept()) as live:
        coder(last)
    return VaeBytes(kept, live.peak - kept)


class _Live(TorchDispatchMode):
    """Tracks the live storages of `existing` tensors and of operation results; `peak` is their largest total bytes."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in existing:
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
    models: Sequence[StreamingModel],
    vae: Any,
    height: int,
    width: int,
    streams: int,
    device: torch.device,
    encoder: Any = None,
) -> None:
    """Make `models` leave memory free for decoding on `device` when they decide how often to expand histories.

    They decide in the first pass of a rollout, before the VAE has allocated anything. Without a `vae`, nothing is
    decoded. `encoder` is the VAE that encodes one source for all streams; it never runs at the same time as decoding.
    """
    # Only CUDA devices report their free memory.
    counts = device.type == "cuda"
    decoding = decoding_bytes(vae, height, width) if counts and vae is not None else _NOTHING
    encoding = encoding_bytes(encoder, height, width) if counts and encoder is not None else _NOTHING
    taken = streams * decoding.kept + encoding.kept + max(decoding.working, encoding.working)
    for model in models:
        if model.kernels is not None:
            model.kernels.leave_free(taken)
