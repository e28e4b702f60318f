"""Restyled videos from files and cameras: read only as far as needed, encoded, and generated end to end."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pico
import psutil
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan
from PIL import Image
from recipe_case import write_teacher
from safetensors.torch import load_file, save_file
from test_decode import tiny_vae
from test_generate_cli import WAN, call, error_line, frames_of, latents_of
from torch import Tensor
from wan_pipeline_case import write_wan_pipeline

import mla_convert
from mla_convert import StreamingMLAPipeline
from mla_convert.distill.encode.frames import UnusableVideo, read_frames, stream_frames, to_pixels
from mla_convert.distill.encode.models import encode_pixels
from mla_convert.distill.encode.streaming import StreamingEncoder
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.release import export
from mla_convert.run.source_video import SourceVideo, open_source
from mla_convert.run.video import save_video

LATENT, SCALE = (4, 2, 3), (4, 8)
ZOO = Path(mla_convert.__file__).parent / "zoo" / "digits" / "teacher"
PROMPT = ["--prompt", "7 at 2,1 moving up-left"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a tiny text encoder and VAE beside it."""
    folder = tmp_path_factory.mktemp("wan")
    source = {"source": {"model": str(write_wan_pipeline(folder / "pipeline"))}}
    save_checkpoint(pico.dense_model(layers=1, **WAN), folder / "checkpoint", source)
    export(folder / "checkpoint", folder / "out", ExportConfig(components="copy"))
    return folder / "out"


def write_video(path: Path, frames: int, size: tuple[int, int] = (16, 24)) -> Path:
    """Pictures whose color changes from frame to frame."""
    levels = np.linspace(0, 1, frames, dtype=np.float32).reshape(-1, 1, 1, 1)
    ramp = np.linspace(0, 1, size[1], dtype=np.float32).reshape(1, 1, -1, 1)
    video = (levels + np.array([0.0, 0.3, 0.6], dtype=np.float32) + ramp) % 1
    save_video(np.broadcast_to(video, (frames, *size, 3)).copy(), path, fps=16, min_pixels=1)
    return path


def write_latents(path: Path, frames: int, shape: tuple[int, int, int]) -> Tensor:
    latents = torch.randn(shape[0], frames, *shape[1:], generator=torch.Generator().manual_seed(3))
    save_file({"latents": latents}, path)
    return latents


def chunked(source: SourceVideo, borders: list[int]) -> list[Tensor]:
    return [source(first, stop) for first, stop in itertools.pairwise([0, *borders])]


def test_frames_one_by_one_are_those_that_are_read_at_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    frames = torch.stack(list(stream_frames(path, 12, 12, 8)))
    assert torch.equal(frames[:9], read_frames(path, 9, 12, 12, 8)) and len(frames) == 10


def test_a_reader_that_is_closed_stops_ffmpeg(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, (144, 192))
    before = len(psutil.Process(os.getpid()).children())
    frames = stream_frames(path, 144, 192, 16)
    next(frames)
    # Its pipe holds less than a frame, so that it waits to be read.
    assert len(psutil.Process(os.getpid()).children()) == before + 1
    frames.close()
    assert len(psutil.Process(os.getpid()).children()) == before


def test_what_is_no_video_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UnusableVideo, match="it cannot be decoded: "):
        next(stream_frames(tmp_path / "a.mp4", 8, 8, 16))
    damaged = write_video(tmp_path / "b.mp4", 60, (144, 192)).read_bytes()
    middle = len(damaged) // 2
    (tmp_path / "b.mp4").write_bytes(damaged[:middle] + bytes(200) + damaged[middle + 200 :])
    taken = []
    with pytest.raises(UnusableVideo):
        taken.extend(stream_frames(tmp_path / "b.mp4", 144, 192, 16))


@pytest.mark.parametrize(("frames", "expected"), [(33, 9), (35, 9), (32, 8), (1, 1), (3, 1), (9, 3)])
def test_chunks_of_a_video_are_encoded_as_the_whole_and_a_tail_is_dropped(
    tmp_path: Path, frames: int, expected: int
) -> None:
    vae, path = tiny_vae(), write_video(tmp_path / "a.mp4", frames)
    source = open_source(path, LATENT, SCALE, 16)
    assert isinstance(source, SourceVideo)
    source.encode_with(vae)
    found = torch.cat(chunked(source, [3, 6, 9, 12]), dim=2)
    whole = read_frames(path, 1 + 4 * (expected - 1), 16, 24, 16)
    assert found.shape == (1, 4, expected, 2, 3)
    torch.testing.assert_close(found, encode_pixels(vae, to_pixels(whole).unsqueeze(0)), rtol=0, atol=1e-6)


def test_a_camera_is_read_no_further_than_a_chunk_needs() -> None:
    read = []

    def camera() -> Iterator[Image.Image]:
        for number in itertools.count():
            read.append(number)
            yield Image.new("RGB", (24, 16), (number % 256, 0, 0))

    frames = camera()
    source = open_source(frames, LATENT, SCALE, 16)
    assert isinstance(source, SourceVideo) and not read
    source.encode_with(tiny_vae())
    for stop, expected in ((3, 9), (6, 21), (9, 33)):
        assert source(stop - 3, stop).shape[2] == 3 and len(read) == expected
    source.close()
    # It is the caller's.
    assert next(frames).size == (24, 16)


def test_pictures_of_a_model_of_pixels_are_averaged(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "L")
    picture.save(tmp_path / "a.png")
    source = open_source(tmp_path / "a.png", (1, 4, 4), (1, 1), 8)
    found = source(0, 3)
    assert found.shape == (1, 1, 1, 4, 4) and source(3, 6).shape[2] == 0
    assert float(found[0, 0, 0, 0, 0]) == pytest.approx(2 * 4.5 / 255 - 1, abs=1 / 255)


def test_a_source_that_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    save_file({"frames": torch.zeros(1)}, tmp_path / "b.safetensors")
    write_latents(tmp_path / "c.safetensors", 3, (4, 2, 4))
    for name, scale, message in (
        ("none.mp4", SCALE, "none.mp4 does not exist; give a source file"),
        ("a.mp4", SCALE, "a.mp4 cannot be used: it cannot be decoded"),
        ("a.mp4", (1, 1), "cannot be read as an image or a video"),
        ("b.safetensors", SCALE, r"a source must be the tensor latents \[C, F, H, W\]"),
        ("c.safetensors", SCALE, "has 4 channels of 2x4, the rollout 4 channels of 2x3"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_source(tmp_path / name, LATENT, scale, 16)
        assert "\n" not in str(caught.value)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    still = open_source(tmp_path / "red.png", LATENT, SCALE, 4)
    assert isinstance(still, SourceVideo)
    (frame,) = still._seen
    assert frame[..., 0].min() > 250 and list(still.frames) == []
    with pytest.raises(UsageError, match="not int"):
        open_source([3], LATENT, SCALE, 16)(0, 1)  # type: ignore[list-item, operator]


def test_a_digits_video_is_restyled_from_end_to_end(capsys: Any, tmp_path: Path) -> None:
    """The whole source without a length, less with one; at strength 1, the video without a source."""
    command = ["generate", ZOO, *PROMPT, "--steps", "4"]
    other = ["generate", ZOO, "--prompt", "3 at 1,0 moving right", "--steps", "4", "--frames", "26", "--seed", "9"]
    made = latents_of(capsys, tmp_path / "made.safetensors", *other)
    assert call(capsys, *other, "--out", tmp_path / "made.mp4")[0] == 0
    source = ["--source", tmp_path / "made.mp4"]
    weak = latents_of(capsys, tmp_path / "weak.safetensors", *command, *source, "--strength", "0.05")
    assert weak.shape == made.shape
    # The file is lossy. Observed: 0.047, and 0.36 of a video without a source.
    assert float((weak - made).abs().mean()) < 0.1
    strong = latents_of(capsys, tmp_path / "strong.safetensors", *command, *source, "--strength", "1")
    plain = latents_of(capsys, tmp_path / "plain.safetensors", *command, "--frames", "26")
    assert torch.equal(strong, plain)
    half = latents_of(capsys, tmp_path / "half.safetensors", *command, *source)
    again = latents_of(capsys, tmp_path / "again.safetensors", *command, *source, "--strength", "0.5")
    assert torch.equal(half, again) and not torch.equal(half, plain)
    short = latents_of(capsys, tmp_path / "short.safetensors", *command, *source, "--seconds", "1")
    assert short.shape[1] == 8
    given = ["--source", tmp_path / "made.safetensors", "--strength", "0.05"]
    assert latents_of(capsys, tmp_path / "given.safetensors", *command, *given).shape == made.shape
    pair = [*command, "--prompt", "3 at 1,0 moving right", *source, "--out", tmp_path / "pair.mp4"]
    assert call(capsys, *pair)[0] == 0
    assert frames_of(tmp_path / "pair-00.mp4") == frames_of(tmp_path / "pair-01.mp4") == 26


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_a_wan_video_goes_through_the_encoder_and_the_decoder(
    capsys: Any, wan: Path, tmp_path: Path, offload: str
) -> None:
    path = write_video(tmp_path / "a.mp4", 15, (32, 48))
    common = ["generate", wan, "--prompt", "a", "--steps", "2", "--guidance-scale", "1", "--size", "32x48"]
    common += ["--fps", "16", "--source", path]
    code, _, err = call(capsys, *common, "--offload", offload, "--out", tmp_path / "out.mp4")
    assert code == 0, err
    # Of 15 frames the last two are too few for a latent frame.
    assert frames_of(tmp_path / "out.mp4") == 13
    latents = latents_of(capsys, tmp_path / "a.safetensors", *common, "--offload", offload, "--strength", "0.3")
    vae = AutoencoderKLWan.from_pretrained(wan / "vae")
    clean = StreamingEncoder(vae)(to_pixels(read_frames(path, 13, 32, 48, 16)).unsqueeze(0))
    save_file({"latents": clean[0]}, tmp_path / "clean.safetensors")
    common[-1] = tmp_path / "clean.safetensors"
    expected = latents_of(capsys, tmp_path / "b.safetensors", *common, "--strength", "0.3")
    assert torch.equal(latents, expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strength", "0.4"], "strength says how much of a source is replaced; give source, or leave strength out"),
        (["--source", "SOURCE", "--strength", "0"], "strength: input should be greater than 0, got 0.0"),
        (["--source", "SOURCE", "--strength", "1.5"], "strength: input should be less than or equal to 1"),
        (["--source", "SOURCE", "--start", "SOURCE"], "give source or start, not both"),
        (["--source", "SOURCE", "--image", "SOURCE"], "has no channels for --image"),
        (["--source", "SOURCE", "--endless"], "leave --endless out"),
        (["--source", "none.mp4"], "none.mp4 does not exist; give a source file"),
        (["--source", "BROKEN"], "cannot be read as an image or a video"),
        (["--source", "LATENTS"], "roll out at the source's latent size"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_is_loaded(
    capsys: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    def loads(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("mla_convert.pipeline.execution.load_models", loads)
    (tmp_path / "broken.mp4").write_text("no video")
    Image.new("L", (16, 16)).save(tmp_path / "source.png")
    write_latents(tmp_path / "latents.safetensors", 3, (1, 8, 8))
    places = {"SOURCE": "source.png", "BROKEN": "broken.mp4", "LATENTS": "latents.safetensors"}
    given = [str(tmp_path / places[word]) if word in places else word for word in more]
    code, _, err = call(capsys, "generate", digits, *PROMPT, *given, "--out", tmp_path / "out.mp4")
    assert code in (1, 2) and message in error_line(err)
    assert not (tmp_path / "out.mp4").exists()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_takes_tensors_files_and_cameras(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = quiet(StreamingMLAPipeline.from_pretrained(wan))
    path = write_video(tmp_path / "a.mp4", 15, (32, 48))
    settings = {"height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 1, "fps": 16}
    frames = read_frames(path, 15, 32, 48, 16)
    from_file = pipe("a", source=path, **settings).frames
    assert from_file.shape == (1, 13, 32, 48, 3)
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    assert np.array_equal(pipe("a", source=iter(pictures), strength=0.5, **settings).frames, from_file)
    clean = StreamingEncoder(pipe.vae)(to_pixels(frames[:13]).unsqueeze(0))
    for latents in (clean, clean[0]):
        assert np.array_equal(pipe("a", source=latents, **settings).frames, from_file)
    assert pipe.num_timesteps == 2
    assert pipe("a", source=str(path), num_frames=5, **settings).frames.shape[1] == 5
    assert len(list(pipe.stream("a", source=path, **settings))) == 4
    plain = pipe("a", num_frames=13, **settings).frames
    assert np.array_equal(pipe("a", source=path, strength=1.0, **settings).frames, plain)

    totals = []
    bar = StreamingMLAPipeline.progress_bar

    def watched(self: Any, iterable: Any = None, total: Any = None) -> Any:
        totals.append(total)
        return bar(self, iterable, total)

    monkeypatch.setattr(StreamingMLAPipeline, "progress_bar", watched)
    pipe("a", source=clean, strength=0.3, **settings)
    pipe("a", source=path, strength=0.3, **settings)
    # Four chunks of two steps: at 0.3 and 0.25.
    assert totals == [8, None]


def test_the_pipeline_refuses_at_the_call(wan: Path, tmp_path: Path) -> None:
    pipe = quiet(StreamingMLAPipeline.from_pretrained(wan))
    path = write_video(tmp_path / "a.mp4", 5, (32, 48))
    settings = {"height": 32, "width": 48, "guidance_scale": 1}
    for more, message in (
        ({"strength": 0.4}, "give source, or leave strength out"),
        ({"source": path, "start": path}, "give source or start, not both"),
        ({"source": path, "strength": 0.0}, "strength: input should be greater than 0"),
        ({"source": "none.mp4"}, "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.stream("a", **more, **settings)
    pipe.vae = None
    with pytest.raises(UsageError, match="no vae to encode the source"):
        pipe.stream("a", source=path, output_type="latent", **settings)


def test_offloading_of_diffusers_brings_the_vae_to_encode_and_takes_it_away(wan: Path, tmp_path: Path) -> None:
    """`enable_model_cpu_offload` does not work without a GPU, so its hooks are added by hand."""
    pipe = quiet(StreamingMLAPipeline.from_pretrained(wan))
    settings = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1, "fps": 16}
    settings["source"] = write_video(tmp_path / "a.mp4", 13, (32, 48))
    expected = pipe("a", **settings).frames
    called: list[str] = []
    hook, pipe._all_hooks, pipe.maybe_free_model_hooks = None, [], lambda: None
    for name in ("transformer", "vae"):
        part = getattr(pipe, name)
        _, hook = cpu_offload_with_hook(part, torch.device("cpu"), prev_module_hook=hook)
        before, back = part._hf_hook.pre_forward, hook.offload
        part._hf_hook.pre_forward = lambda *given, name=name, before=before, **more: (
            called.append(name),
            before(*given, **more),
        )[1]
        hook.offload = lambda name=name, back=back: (called.append(f"{name} back"), back())
        pipe._all_hooks.append(hook)
    np.testing.assert_array_equal(pipe("a", **settings).frames, expected)
    # The source is encoded; a step at 0.5; decoding; then a write.
    assert called == ["vae", "vae back", "transformer"] * 8


def test_a_recipe_restyles_what_it_says(digits: Path, tmp_path: Path) -> None:
    from mla_convert.recipe.schema import validate
    from mla_convert.run.config import GenerateConfig
    from mla_convert.run.sample import rollout

    write_latents(tmp_path / "a.safetensors", 5, (1, 16, 16))
    config = validate(GenerateConfig, {"source": str(tmp_path / "a.safetensors"), "num_inference_steps": 2})
    assert config.num_frames is None and config.strength == 0.5
    assert validate(GenerateConfig, config.model_dump(mode="json")) == config
    assert validate(GenerateConfig, {}).num_frames == 21
    for given, message in (
        ({"strength": 0.4}, "give source, or leave strength out"),
        ({"source": "a", "start": "b"}, "give source or start, not both"),
        ({"source": "a", "strength": 0.0}, "strength"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            validate(GenerateConfig, given)
        assert "\n" not in str(caught.value)
    model = pico.dense_model(in_channels=1, out_channels=1, text_dim=80)
    told: list[tuple[int, int]] = []
    text = torch.zeros(1, 3, model.config.text_dim)
    config = config.model_copy(update={"latent_height": 16, "latent_width": 16})
    made = torch.cat(list(rollout(model, text, config, lambda done, total: told.append((done, total)))), dim=2)
    assert made.shape == (1, 1, 5, 16, 16) and told[-1] == (5, 5)
    assert load_file(tmp_path / "a.safetensors")["latents"].shape[1] == 5
