"""What decoding a rollout holds, counted before anything is decoded: on the meta device, where tensors have no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .decode import StreamingDecoder


class DecodingBytes(NamedTuple):
    """`kept`: bytes that a stream's features take between chunks; `working`: what the decoder takes while it runs.

    Streams are decoded one after another, so `streams` of them take `total(streams)` at most, beside the VAE's weights
    and what the libraries of a device ask for themselves.
    """

    kept: int
    working: int

    def total(self, streams: int) -> int:
        return streams * self.kept + self.working


def decoding_bytes(vae: Any, height: int, width: int) -> DecodingBytes:
    """Of decoding latents of `height x width` chunk by chunk with `vae`, an `AutoencoderKLWan`, in its dtype."""
    with torch.device("meta"):
        twin: Any = type(vae).from_config(vae.config).eval()
        decoder, latent = StreamingDecoder(twin), torch.empty(1, vae.config.z_dim, 1, height, width)
    # By torch's own method: that of diffusers warns of parts that want float32, of which this VAE has none.
    nn.Module.to(twin, vae.dtype)
    decoder(latent)
    # The second frame is the first of four video frames, the third finds all features at their full size.
    decoder(latent)
    kept = sum(x.untyped_storage().nbytes() for x in decoder.kept())
    with _Live(decoder.kept()) as live:
        decoder(latent)
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


def reserve(models: Sequence[Any], vae: Any, height: int, width: int, streams: int, device: torch.device) -> None:
    """Have `models` leave room for decoding on `device` when they decide how often histories are expanded.

    They do so in the first pass of a rollout, before the VAE has taken anything. Without a `vae` nothing is decoded.
    """
    # No other device says how much of its memory is free.
    decodes = vae is not None and device.type == "cuda"
    taken = decoding_bytes(vae, height, width).total(streams) if decodes else 0
    for model in models:
        if model.kernels is not None:
            model.kernels.reserved = taken
