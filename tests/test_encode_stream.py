"""Encoding a video chunk by chunk with Wan's VAEs, and the memory it keeps."""

from __future__ import annotations

import pico
import pytest
import torch
from pretend_gpu import GPU
from test_decode import VAES, tiny_vae
from torch import Tensor

from mla_convert.distill.encode.models import encode_pixels
from mla_convert.distill.encode.streaming import StreamingEncoder
from mla_convert.run.decode_memory import VaeBytes, _Live, decoding_bytes, encoding_bytes, reserve


def pixels(name: str = "wan2.1", frames: int = 33, batch: int = 1) -> Tensor:
    height, width = (16, 24) if name == "wan2.1" else (32, 48)
    return 2 * torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("sizes", [[33], [9, 12, 12], [1, 4, 28], [13, 20], [1] + [4] * 8], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_encoding_in_parts_is_encoding_the_whole(name: str, sizes: list[int]) -> None:
    vae, video = tiny_vae(name), pixels(name, batch=2)
    encoder = StreamingEncoder(vae)
    parts = [encoder(part) for part in video.split(sizes, dim=2)]
    assert [part.shape[2] for part in parts] == [1 + (sizes[0] - 1) // 4, *(size // 4 for size in sizes[1:])]
    found = torch.cat(parts, dim=2)
    assert found.dtype == torch.float32
    # Observed: 1.2e-7, as the last convolution of the whole rounds differently.
    torch.testing.assert_close(found, encode_pixels(vae, video), rtol=0, atol=1e-6)
    by_frame, alone = StreamingEncoder(vae), StreamingEncoder(vae)
    borders = [1] + [4] * 8
    assert torch.equal(found, torch.cat([by_frame(part) for part in video.split(borders, dim=2)], dim=2))
    assert torch.equal(found[1:], alone(video[1:]))


def test_videos_share_a_vae_and_what_is_kept_does_not_grow() -> None:
    vae, sizes = tiny_vae(), []
    one, other = StreamingEncoder(vae), StreamingEncoder(vae)
    first, second = pixels(frames=33), pixels(frames=33).flip(2)
    expected = [StreamingEncoder(vae)(video) for video in (first, second)]
    made: tuple[list[Tensor], list[Tensor]] = [], []
    for a, b in zip(first.split([1] + [4] * 8, dim=2), second.split([1] + [4] * 8, dim=2), strict=True):
        made[0].append(one(a))
        made[1].append(other(b))
        encode_pixels(vae, first[:, :, :5])
        sizes.append(sum(x.numel() for x in one.kept()))
    assert all(torch.equal(torch.cat(parts, dim=2), whole) for parts, whole in zip(made, expected, strict=True))
    assert len(set(sizes[2:])) == 1


def test_frames_that_are_left_over_are_refused() -> None:
    encoder = StreamingEncoder(tiny_vae())
    with pytest.raises(ValueError, match="one frame and then 4 at a time, not 4"):
        encoder(pixels(frames=4))
    encoder(pixels(frames=5))
    with pytest.raises(ValueError, match="not 5"):
        encoder(pixels(frames=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VAES)
def test_the_count_is_what_encoding_holds(name: str, dtype: torch.dtype) -> None:
    vae = torch.nn.Module.to(tiny_vae(name), dtype)
    encoder, (*chunks, last) = StreamingEncoder(vae), [pixels(name, frames) for frames in (1, 4, 4, 4)]
    for chunk in chunks:
        encoder(chunk)
    kept = sum(x.untyped_storage().nbytes() for x in encoder.kept())
    with _Live(encoder.kept()) as live:
        encoder(last)
    counted = encoding_bytes(vae, 2, 3)
    assert counted.kept == kept
    # Attention may take other temporaries on another device.
    assert live.peak - kept == pytest.approx(counted.working, rel=0.05)


def test_room_is_left_for_a_source_beside_decoding() -> None:
    model, vae = pico.dense_model(), tiny_vae()
    model.set_kernels("torch")
    decoding, encoding = decoding_bytes(vae, 2, 3), encoding_bytes(vae, 2, 3)
    both = VaeBytes(2 * decoding.kept + encoding.kept, max(decoding.working, encoding.working))
    for decodes, expected in ((vae, sum(both)), (None, sum(encoding))):
        reserve([model], decodes, 2, 3, 2, GPU, vae)
        assert model.kernels.left_free == expected
