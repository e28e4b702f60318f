"""Decoding a rollout chunk by chunk, together with threads and files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pico
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor
from wan_pipeline_case import STATISTICS

from mla_convert.distill.encode.models import encode_pixels
from mla_convert.errors import UsageError, UserError
from mla_convert.run.decode import StreamingDecoder, decode_chunks, frame_chunks
from mla_convert.run.latents import first_video_frame, latent_frames
from mla_convert.run.prefetch import FrameWriter, prefetch
from mla_convert.run.prompts import PromptSchedule
from mla_convert.run.start import read_start
from mla_convert.run.stream import stream_chunks
from mla_convert.run.video import STDOUT, denormalized, save_video

# That of Wan2.1, and the residual one with patches of Wan2.2-TI2V-5B.
VAES = {
    "wan2.1": {"base_dim": 3, "dim_mult": [1, 1, 1, 1]},
    "wan2.2": {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 1], "is_residual": True, "in_channels": 12}
    | {"out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
}


def tiny_vae(name: str = "wan2.1") -> Any:
    torch.manual_seed(0)
    return AutoencoderKLWan(z_dim=4, num_res_blocks=1, **STATISTICS, **VAES[name]).eval()


def latents(frames: int = 7, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, frames, 2, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", [[7], [1, 3, 3], [3, 3, 1], [1] * 7], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_decoding_in_parts_is_decoding_the_whole(name: str, sizes: list[int]) -> None:
    vae, video = tiny_vae(name), latents()
    with torch.no_grad():
        expected = vae.decode(denormalized(vae, video)).sample
    parts = list(decode_chunks(video.split(sizes, dim=2), vae))
    counts = [4 * size - (3 if index == 0 else 0) for index, size in enumerate(sizes)]
    assert [part.shape[2] for part in parts] == counts
    # Observed: 3.3e-6 of 1, as a convolution of one frame rounds differently.
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=1e-5)
    by_frame = list(decode_chunks(video.split(1, dim=2), vae))
    assert torch.equal(torch.cat(parts, dim=2), torch.cat(by_frame, dim=2))


def test_rollouts_share_a_vae_and_leave_it_as_it_was() -> None:
    vae, (one, other) = tiny_vae(), latents().unsqueeze(1)
    expected = [torch.cat(list(decode_chunks(video.split(3, dim=2), vae)), dim=2) for video in (one, other)]
    decoders = StreamingDecoder(vae), StreamingDecoder(vae)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunks in zip(one.split(3, dim=2), other.split(3, dim=2), strict=True):
        for decoder, chunk, made in zip(decoders, chunks, parts, strict=True):
            made.append(decoder(chunk))
        with torch.no_grad():
            vae.decode(latents(2))
    assert all(torch.equal(torch.cat(made, dim=2), whole) for made, whole in zip(parts, expected, strict=True))


def test_the_past_that_is_kept_does_not_grow() -> None:
    decoder, sizes = StreamingDecoder(tiny_vae()), []
    for chunk in latents(12).split(2, dim=2):
        decoder(chunk)
        sizes.append(sum(x.numel() for x in decoder.kept()))
    assert len(set(sizes[1:])) == 1


@pytest.mark.parametrize("name", VAES)
def test_an_item_of_a_batch_is_decoded_as_if_alone(name: str) -> None:
    vae, video = tiny_vae(name), latents(4, batch=3)
    together = torch.cat(list(decode_chunks(video.split([1, 3], dim=2), vae)), dim=2)
    alone = [torch.cat(list(decode_chunks(item.split([1, 3], dim=2), vae)), dim=2) for item in video.split(1)]
    assert torch.equal(together, torch.cat(alone))


def test_a_tiled_vae_is_refused() -> None:
    vae = tiny_vae()
    vae.enable_tiling()
    with pytest.raises(ValueError, match="cannot decode chunk by chunk"):
        StreamingDecoder(vae)


def test_frames_are_those_of_each_item() -> None:
    vae = tiny_vae()
    first, second = frame_chunks(latents(4).split([1, 3], dim=2), vae)
    assert [video.shape for video in first + second] == [(1, 16, 24, 3)] * 2 + [(12, 16, 24, 3)] * 2
    with pytest.raises(UserError, match="NaN"):
        list(frame_chunks([torch.full((1, 4, 1, 2, 3), float("nan"))], vae))


def test_latent_frames_and_video_frames() -> None:
    assert [first_video_frame(frame, 4) for frame in (0, 1, 2, 21)] == [0, 1, 5, 81]
    assert [first_video_frame(frame, 1) for frame in (0, 1, 7)] == [0, 1, 7]
    assert [latent_frames(frames, 4) for frames in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]
    assert latent_frames(12, 1) == 12


def test_changes_take_effect_with_the_first_chunk_that_begins_then() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(1)
    schedule = PromptSchedule([(0.5, a), (1.0, b), (1.1, c)], fps=16, temporal=4)
    # Chunks begin with the video frames 0, 9, 21: at 0, 0.56 and 1.3 seconds.
    assert [schedule(frame) for frame in (0, 3, 6, 9)] == [None, a, c, None]


def test_a_start_of_pictures_goes_through_the_vae(tmp_path: Path) -> None:
    vae = tiny_vae()
    video = np.random.default_rng(0).random((9, 16, 24, 3), dtype=np.float32)
    save_video(video, tmp_path / "start.mp4", fps=16, min_pixels=1)
    found = read_start(tmp_path / "start.mp4", 4, 2, 3, vae)
    assert found.shape == (4, 3, 2, 3) and found.dtype == torch.float32

    Image.new("RGB", (48, 16), (255, 0, 0)).save(tmp_path / "start.png")
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 16, 24)
    assert torch.equal(read_start(tmp_path / "start.png", 4, 2, 3, vae), encode_pixels(vae, red)[0])

    save_video(video[:4], tmp_path / "start.mp4", fps=16, min_pixels=1)
    with pytest.raises(
        UsageError, match=r"start.mp4 has 4 frames, but the VAE takes one and then 4 at a time; give 1 or 5"
    ):
        read_start(tmp_path / "start.mp4", 4, 2, 3, vae)


def test_a_start_that_was_decoded_joins_without_a_seam() -> None:
    """The chunks of a start are decoded too, so later frames have their past."""
    vae, model = (
        tiny_vae(),
        pico.dense_model(in_channels=4, out_channels=4, causal={"num_frames_per_block": 2, "window_frames": 4}),
    )
    prompts = pico.inputs(1, 1, 4, 4)[2]
    whole = list(stream_chunks(model, prompts, 6, 4, 4, num_inference_steps=1))
    again = list(stream_chunks(model, prompts, 6, 4, 4, num_inference_steps=1, start=torch.cat(whole[:2], dim=2)))
    expected, found = (torch.cat(list(decode_chunks(chunks, vae)), dim=2) for chunks in (whole, again))
    assert torch.equal(found, expected)


def test_the_next_chunk_is_computed_while_one_is_used() -> None:
    begun, used = [threading.Event() for _ in range(3)], threading.Event()

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    ahead = prefetch(items())
    assert next(ahead) == 0
    # Nobody has asked for it.
    assert begun[1].wait(10)
    used.set()
    assert list(ahead) == [1, 2]


def test_a_consumer_that_stops_ends_the_thread() -> None:
    before, made = threading.active_count(), []

    def items() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    ahead = prefetch(items(), count=2)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert threading.active_count() == before and len(made) <= 6


def test_closing_waits_only_so_long_for_a_camera_that_never_returns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mla_convert.run.prefetch.LONGEST_CLOSE", 0.2)
    frame, ended = threading.Event(), threading.Event()

    def camera() -> Iterator[int]:
        try:
            yield 1
            frame.wait(60)
            yield 2
        finally:
            ended.set()

    closed = threading.Event()
    ahead = prefetch(camera(), closed=closed)
    assert next(ahead) == 1
    (thread,) = (one for one in threading.enumerate() if one.name == "prefetch")
    begun = time.monotonic()
    ahead.close()
    assert time.monotonic() - begun < 30 and closed.is_set() and not ended.is_set()
    # So the process can exit.
    assert thread.daemon and "its next chunk is not finished" in caplog.text
    frame.set()
    thread.join(10)
    assert ended.is_set() and not thread.is_alive()


@pytest.mark.parametrize("count", [0, 1])
def test_what_computing_raises_is_raised_in_its_place(count: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise UserError("the model diverged")

    ahead = prefetch(items(), count)
    assert next(ahead) == 1
    with pytest.raises(UserError, match="diverged"):
        next(ahead)


def gray(frames: int = 4) -> np.ndarray:
    return np.full((frames, 16, 16, 3), 0.5, dtype=np.float32)


def test_a_writer_writes_what_save_video_writes(tmp_path: Path) -> None:
    writer = FrameWriter(tmp_path / "a.mp4", fps=8)
    for _ in range(5):
        writer.put(gray())
    assert not (tmp_path / "a.mp4").exists()
    writer.close()
    save_video(np.concatenate([gray()] * 5), tmp_path / "b.mp4", fps=8)
    assert writer.frames == 20
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_writer_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    writer = FrameWriter(tmp_path / "a.mp4", fps=8)
    writer.put(gray())
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", ["end", "close", "abort"])
def test_a_writer_that_has_ended_takes_no_more_frames(tmp_path: Path, last: str) -> None:
    writer = FrameWriter(tmp_path / "a.mp4", fps=8)
    writer.put(gray())
    getattr(writer, last)()
    with pytest.raises(ValueError, match=r"a\.mp4 has ended and takes no more frames"):
        writer.put(gray())
    writer.close()
    assert writer.frames == 4
    assert (tmp_path / "a.mp4").exists() == (last != "abort")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_rollout_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_convert.files._create", lambda path: path.symlink_to("/dev/full"))
    writer = FrameWriter(tmp_path / "a.gif", fps=8)
    writer.put(gray())
    with pytest.raises(UserError, match="the disk is full"):
        writer.close()
    with pytest.raises(UserError, match="the disk is full"):
        writer.put(gray())
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_the_writer_holds_the_rollout_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, taken = threading.Event(), []

    def slow(chunks: Any, *rest: Any) -> None:
        for chunk in chunks:
            taken.append(chunk)
            gate.wait(10)

    monkeypatch.setattr("mla_convert.run.prefetch.save_video", slow)
    writer = FrameWriter(tmp_path / "a.mp4", fps=8)
    filler = threading.Thread(target=lambda: [writer.put(gray()) for _ in range(6)])
    filler.start()
    time.sleep(0.5)
    assert len(taken) == 1 and writer.frames <= 12
    gate.set()
    filler.join()
    writer.close()
    assert len(taken) == 6


def test_stdout_gets_an_mp4_in_fragments(capfdbinary: Any, tmp_path: Path) -> None:
    save_video(np.concatenate([gray()] * 6), STDOUT, fps=8)
    (tmp_path / "a.mp4").write_bytes(capfdbinary.readouterr().out)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.count(b"moof") == 3 and content.index(b"moov") < content.index(b"mdat")
    # A reader that comes too late for the end still sees whole fragments.
    (tmp_path / "cut.mp4").write_bytes(content[: content.rindex(b"moof") - 4])
    for name, frames in (("a.mp4", 24), ("cut.mp4", 16)):
        reader = imageio_ffmpeg.read_frames(str(tmp_path / name))
        assert next(reader)["size"] == (256, 256)
        assert sum(1 for _ in reader) == frames
