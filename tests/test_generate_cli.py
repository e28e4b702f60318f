"""`mla-convert generate` on a digits model and on a Wan model with a tiny VAE and text encoder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pico
import pytest
import torch
from PIL import Image
from recipe_case import write_teacher
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_pipeline_case import DIM, write_wan_pipeline
from warm import Done, Python

from mla_convert import StreamingMLAPipeline
from mla_convert.cli import main
from mla_convert.distill.encode.models import load_vae, text_encoder
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.manifest import recorded_section
from mla_convert.export.release import export
from mla_convert.pipeline.prompts import parse_change, read_prompts
from mla_convert.run.decode import StreamingDecoder, frame_chunks
from mla_convert.run.parts import PICTURES, TEXT, find_parts
from mla_convert.run.sample import trained_for
from mla_convert.run.stream import stream_chunks
from mla_convert.run.video import save_video

WAN = {"in_channels": 4, "out_channels": 4, "text_dim": DIM, "causal": {"num_frames_per_block": 1, "window_frames": 4}}
SIZE = ["--size", "32x48", "--steps", "1", "--fps", "8"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as Wan publishes it, with a dense transformer of four latent channels."""
    folder = write_wan_pipeline(tmp_path_factory.mktemp("pipeline"))
    pico.dense_model(**WAN).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def checkpoint(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that remembers its source, with a recipe's `generate` section."""
    folder = tmp_path_factory.mktemp("checkpoint") / "wan"
    recipe = {"generate": {"num_inference_steps": 2, "shift": 5.0, "guidance_scale": 1.0, "num_frames": 99}}
    save_checkpoint(pico.dense_model(**WAN), folder, {"source": {"model": str(pipeline)}, "recipe": recipe})
    return folder


def call(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def error_line(err: str) -> str:
    """The only line of an error; empty lines come from the progress bars."""
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def frames_of(path: Path) -> int:
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return sum(1 for _ in reader)


def latents_of(capsys: Any, out: Path, *arguments: Any) -> Tensor:
    code, _, err = call(capsys, *arguments, "--out", out)
    assert code == 0, err
    return load_file(out)["latents"]


def test_a_prompt_goes_through_the_text_encoder_and_the_vae(capsys, checkpoint, pipeline, tmp_path):
    out = tmp_path / "frames"
    settings = ["--prompt", "a red  square", "--frames", "3", "--negative-prompt", "dark", "--guidance-scale", "2"]
    code, printed, err = call(capsys, "generate", checkpoint, *settings, *SIZE, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(printed)["frames"] == 3 and len(list(out.iterdir())) == 9

    with text_encoder(pipeline, torch.bfloat16, torch.device("cpu")) as embed:
        told, negative = embed(["a red  square"]).float(), embed(["dark"]).float()
    chunks = stream_chunks(
        pico.dense_model(**WAN),
        told,
        3,
        4,
        6,
        num_inference_steps=1,
        shift=5.0,
        guidance_scale=2.0,
        negative_hidden_states=negative,
    )
    video = np.concatenate([frames[0] for frames in frame_chunks(chunks, load_vae(pipeline))])
    save_video(video, tmp_path / "expected", fps=8)
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_the_vae_decodes_in_the_dtype_that_is_asked_for_and_encodes_in_float32(
    capsys, checkpoint, tmp_path, monkeypatch
):
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "start.png")
    decoder, used = StreamingDecoder.__call__, []

    def watched(self, latents):
        used.append((self.vae.dtype, decoder(self, latents)))
        return used[-1][1]

    monkeypatch.setattr(StreamingDecoder, "__call__", watched)
    common = ["generate", checkpoint, "--prompt", "a", "--frames", "2", *SIZE, "--start", tmp_path / "start.png"]
    for name, more in (("a", []), ("b", ["--vae-dtype", "float32"]), ("c", ["--vae-dtype", "bfloat16"])):
        assert call(capsys, *common, *more, "--out", tmp_path / name)[0] == 0
    assert [dtype for dtype, _ in used] == [torch.float32] * 4 + [torch.bfloat16] * 2
    whole, again, half = (torch.cat([pixels for _, pixels in used[i : i + 2]], dim=2) for i in (0, 2, 4))
    assert torch.equal(whole, again)
    # Observed: 0.065, of a random VAE of three channels.
    assert float((half - whole).norm() / whole.norm()) < 0.2


def test_the_negative_prompt_of_the_recipe_is_the_default(capsys, pipeline, tmp_path):
    generate = {"num_inference_steps": 1, "guidance_scale": 2.0, "negative_prompt": "dark"}
    manifest = {"source": {"model": str(pipeline)}, "recipe": {"generate": generate}}
    save_checkpoint(pico.dense_model(**WAN), tmp_path / "model", manifest)
    settings = [tmp_path / "model", "--prompt", "a red  square", "--frames", "1", "--latent-size", "4x6"]

    def made(name: str, *options: str) -> Tensor:
        return latents_of(capsys, tmp_path / f"{name}.safetensors", "generate", *settings, *options)

    recorded, told = made("recorded"), made("told", "--negative-prompt", "dark")
    assert torch.equal(recorded, told)
    assert not torch.equal(recorded, made("empty", "--negative-prompt", ""))
    pipe = StreamingMLAPipeline.from_pretrained(tmp_path / "model", vae=None)
    embeds = {"prompt_embeds": embedding(pipeline, "a red  square"), "height": 32, "width": 48, "num_frames": 1}
    with pytest.raises(UsageError, match=r"no text encoder .* negative_prompt_embeds"):
        pipe(**embeds, output_type="latent")
    video = pipe(**embeds, negative_prompt_embeds=embedding(pipeline, "dark"), output_type="latent").frames
    assert torch.equal(video[0], recorded)


def test_guidance_of_embeddings_needs_a_negative_prompt(capsys, checkpoint, pipeline, tmp_path):
    """Only for digits are zeros the empty prompt."""
    embeds = {"prompt_embeds": embedding(pipeline, "a red  square")}
    save_file(embeds, tmp_path / "prompt.safetensors")
    settings = [checkpoint, "--prompt-embeds", tmp_path / "prompt.safetensors", "--frames", "1", *SIZE]
    out = tmp_path / "a.safetensors"
    code, _, err = call(capsys, "generate", *settings, "--guidance-scale", "2", "--out", out)
    assert code == 2 and "needs a negative prompt; give --negative-embeds or --guidance-scale 1" in err
    assert not out.exists()
    plain = latents_of(capsys, out, "generate", *settings, "--guidance-scale", "1")
    pipe = StreamingMLAPipeline.from_pretrained(checkpoint, vae=None, text_encoder=None, tokenizer=None)
    given = {**embeds, "height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 1, "output_type": "latent"}
    with pytest.raises(UsageError, match="needs a negative prompt; pass negative_prompt_embeds, or guidance_scale=1"):
        pipe(**given, guidance_scale=2.0)
    assert torch.equal(pipe(**given, guidance_scale=1.0).frames[0], plain)


def embedding(pipeline: Path, prompt: str) -> Tensor:
    """The embedding `[1, L, D]` of a prompt."""
    with text_encoder(pipeline, torch.bfloat16, torch.device("cpu")) as embed:
        return embed([prompt]).float()


def test_parts_are_found_beside_the_model_by_name_and_in_the_source(checkpoint, pipeline, tmp_path, monkeypatch):
    assert find_parts(checkpoint, TEXT) == find_parts(checkpoint, PICTURES) == pipeline
    assert find_parts(tmp_path, PICTURES, str(pipeline)) == pipeline
    export(checkpoint, tmp_path / "copied", ExportConfig(components="copy"))
    assert find_parts(tmp_path / "copied", TEXT) == tmp_path / "copied"

    export(checkpoint, tmp_path / "named", ExportConfig(components="none"))
    index = json.loads((tmp_path / "named" / "model_index.json").read_text())
    entry = {"repository": "owner/wan", "revision": "abc", "library": "diffusers", "class": "AutoencoderKLWan"}
    index["_components"] = {"vae": {**entry, "subfolder": "vae"}}
    (tmp_path / "named" / "model_index.json").write_text(json.dumps(index))
    asked = []
    monkeypatch.setattr("mla_convert.run.parts.download", lambda *given: asked.append(given) or pipeline)
    assert find_parts(tmp_path / "named", PICTURES) == pipeline
    assert asked == [("owner/wan", "abc", ["model_index.json", "vae/*"])]
    with pytest.raises(UserError, match=r"has no tokenizer; give the folder or Hub ID of a complete pipeline"):
        find_parts(tmp_path, TEXT, str(tmp_path))
    assert find_parts(tmp_path, TEXT) is None
    source = {"model": "owner/student", "revision": "abc", "components": str(pipeline)}
    save_checkpoint(pico.dense_model(**WAN), tmp_path / "student", {"source": source})
    assert find_parts(tmp_path / "student", TEXT) == pipeline


def test_what_the_recipe_says_is_the_default(checkpoint, digits):
    sampling = recorded_section(checkpoint, "generate")
    assert trained_for(sampling, digits=False) == {"num_inference_steps": 2, "shift": 5.0}
    assert trained_for(sampling, digits=True)["shift"] == 5.0
    assert trained_for(recorded_section(digits, "generate"), digits=True) == {
        "shift": 3.0,
        "guidance_scale": 3.0,
        "fps": 8,
    }


def test_a_change_of_prompt_leaves_what_came_before(capsys, checkpoint, pipeline, tmp_path):
    common = ["generate", checkpoint, "--prompt", "a red square", "--frames", "5", *SIZE]
    before = latents_of(capsys, tmp_path / "a.safetensors", *common)
    # Chunks of one frame begin with the video frames 0, 1, 5, 9, 13 of eight a second.
    after = latents_of(capsys, tmp_path / "b.safetensors", *common, "--prompt-at", "1:the dark")
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3], before[:, 3])

    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- {seconds: 1, prompt: the dark}\n- {seconds: 0, prompt: a red square}\n")
    given = ["generate", checkpoint, "--prompts", prompts, "--frames", "5", *SIZE]
    assert torch.equal(latents_of(capsys, tmp_path / "c.safetensors", *given), after)


def test_recache_writes_the_window_again_for_the_new_prompt(capsys, checkpoint, tmp_path):
    """In a window of four frames that is still filling, the rest continues a start with the new prompt."""
    common = ["generate", checkpoint, "--frames", "4", *SIZE]
    changed = [*common, "--prompt", "a red square", "--prompt-at", "1:the dark"]
    kept = latents_of(capsys, tmp_path / "kept.safetensors", *changed, "--no-recache")
    anew = latents_of(capsys, tmp_path / "anew.safetensors", *changed, "--recache")
    assert torch.equal(anew[:, :3], kept[:, :3]) and not torch.equal(anew[:, 3], kept[:, 3])
    save_file({"latents": anew[:, :3].contiguous()}, tmp_path / "start.safetensors")
    start = ["--prompt", "the dark", "--start", tmp_path / "start.safetensors"]
    assert torch.equal(latents_of(capsys, tmp_path / "c.safetensors", *common, *start), anew)


def test_several_prompts_are_several_videos(capsys, digits, tmp_path):
    common = ["generate", digits, "--frames", "6", "--steps", "1"]
    told = ["--prompt", "7", "--prompt", "3 moving up"]
    code, printed, _ = call(capsys, *common, *told, "--seed", "4", "--out", tmp_path / "v.mp4", "--json")
    result = json.loads(printed)
    assert code == 0 and result["paths"] == [str(tmp_path / f"v-0{index}.mp4") for index in range(2)]
    both = [tmp_path / f"l-0{index}.safetensors" for index in range(2)]
    assert call(capsys, *common, *told, "--seed", "4", "--out", tmp_path / "l.safetensors")[0] == 0
    alone = latents_of(capsys, tmp_path / "b.safetensors", *common, "--prompt", "3 moving up", "--seed", "5")
    # Observed: 1.4e-6.
    torch.testing.assert_close(load_file(both[1])["latents"], alone, rtol=0, atol=1e-5)


def test_seconds_and_steps_at_given_levels(capsys, digits, tmp_path):
    common = ["generate", digits, "--prompt", "7", "--fps", "4"]
    levels = ["--sampler", "renoise", "--denoising-steps", "1000,500"]
    made = latents_of(capsys, tmp_path / "a.safetensors", *common, "--seconds", "1.6", *levels)
    assert made.shape == (1, 6, 16, 16)
    even = latents_of(
        capsys, tmp_path / "b.safetensors", *common, "--frames", "6", "--sampler", "renoise", "--steps", "2"
    )
    torch.testing.assert_close(made, even, rtol=0, atol=1e-5)


def test_a_picture_begins_a_video_of_latents(capsys, checkpoint, tmp_path):
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "start.png")
    common = ["generate", checkpoint, "--prompt", "a", "--frames", "2", *SIZE, "--start", tmp_path / "start.png"]
    made = latents_of(capsys, tmp_path / "a.safetensors", *common)
    save_file({"latents": made[:, :1].contiguous()}, tmp_path / "start.safetensors")
    again = [*common[:-1], tmp_path / "start.safetensors"]
    assert torch.equal(latents_of(capsys, tmp_path / "b.safetensors", *again), made)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_makes_the_same_video(capsys, checkpoint, tmp_path, offload):
    common = ["generate", checkpoint, "--prompt", "a", "--frames", "2", *SIZE]
    for name, more in (("a.mp4", []), ("b.mp4", ["--offload", offload])):
        assert call(capsys, *common, *more, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", "7", "--seconds", "0"], 2, "a video of 0 seconds has no frames"),
        (["--prompt", "7", "--seconds=-3"], 2, "a video of -3 seconds has no frames"),
        (["--prompt", "7", "--seconds", "nan"], 2, "a video of nan seconds has no frames"),
        (["--prompt", "7", "--sampler", "ddim"], 2, "'ddim' is not one of 'euler', 'renoise'"),
        (
            ["--prompt", "7", "--denoising-steps", "250,1000"],
            2,
            "denoising_steps: the steps must fall from at most 1000 to at least 1",
        ),
        (["--prompt", "7", "--denoising-steps", "many"], 2, "'many' is not a list of denoising steps"),
        (["--prompt", "7", "--size", "15x16"], 2, "use a height of 16"),
        (["--prompt", "7", "--size", "16x16", "--latent-size", "16x16"], 2, "give --size or --latent-size"),
        (["--prompt", "7", "--seconds", "1", "--endless"], 2, "give only one of --frames, --seconds and --endless"),
        (["--prompt", "7", "--prompt-at", "soon: 3"], 2, "'soon: 3' is not a prompt with a time"),
        (["--prompt", "7", "--prompt-at", "-1:3"], 2, "seconds"),
        (["--prompt", "7", "--prompt-at", "1:3", "--prompt-at", "1:4"], 2, "two prompts begin at 1 seconds"),
        (
            ["--prompt", "7", "--frames", "8", "--prompt-at", "1:3"],
            2,
            "the prompt at 1 seconds comes after the end of the video, which is 1 seconds long",
        ),
        (["--prompt", "7", "--prompt-at", "1:seven"], 2, "cannot read the digits prompt 'seven'"),
        (["--prompts", "none.yaml"], 1, "cannot read prompts from none.yaml: No such file"),
        (["--prompt", "7", "--endless", "--out", "x.gif"], 2, "a .gif file is kept in memory until its end"),
        (["--prompt", "7", "--prompt", "3", "--out", "-"], 2, "stdout takes one video"),
        (["--prompt", "7", "--json", "--out", "-"], 2, "--json prints to stdout"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_line(capsys, digits, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    options = options if "--out" in options else [*options, "--out", "x.mp4"]
    got, printed, err = call(capsys, "generate", digits, *options)
    assert message in error_line(err)
    assert (got, printed) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "", "a.yaml has no prompts"),
        ("a.yaml", "[]", "a.yaml has no prompts"),
        ("a.jsonl", "\n", "a.jsonl has no prompts"),
        ("a.yaml", "seconds: 1", "a.yaml is not a list"),
        ("a.yaml", "- a cat", "a.yaml, entry 1: 'a cat' is not a mapping with seconds and prompt"),
        ("a.yaml", "- {seconds: 1, promt: a}", "a.yaml, entry 1"),
        ("a.yaml", "- {seconds: .inf, prompt: a}", "a.yaml, entry 1"),
        ("a.yaml", "- {seconds: 1, prompt: ''}", "a.yaml, entry 1"),
        ("a.yaml", "- [", "a.yaml: line"),
        ("a.jsonl", '{"seconds": 1', "a.jsonl, line 1: not valid JSON"),
    ],
)
def test_a_prompts_file_that_says_something_else(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompts_file_in_another_encoding(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"- {seconds: 0, prompt: \xe9t\xe9}")
    with pytest.raises(UserError, match=r"a\.yaml: it is not UTF-8 text$"):
        read_prompts(tmp_path / "a.yaml")


def test_a_prompts_file_is_put_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"seconds": 2.5, "prompt": "b"}\n\n{"seconds": 0, "prompt": "a"}\n')
    assert [(change.seconds, change.prompt) for change in read_prompts(tmp_path / "a.jsonl")] == [(0, "a"), (2.5, "b")]
    assert parse_change("1.5: at 3:30").prompt == "at 3:30"


def test_what_a_wan_model_lacks_is_named(capsys, tmp_path):
    pico.dense_model(**WAN).save_pretrained(tmp_path / "alone")
    save_file({"prompt_embeds": torch.zeros(3, DIM)}, tmp_path / "embeds.safetensors")
    for options, message in (
        (["--prompt", "a"], "this checkpoint has no text encoder; give --components"),
        (["--prompt-embeds", tmp_path / "embeds.safetensors"], "has no VAE; give --components"),
        (["--prompt", "a", "--size", "20x48"], "a height of 20 is not a multiple of the VAE's 8; use 16"),
        (["--prompt", "a", "--size", "24x48"], "use a height of 4 (32 pixels)"),
    ):
        code, _, err = call(capsys, "generate", tmp_path / "alone", *options, "--out", tmp_path / "x.mp4")
        assert code == 2 and message in error_line(err)
    code, _, err = call(capsys, "generate", tmp_path, "--prompt", "a", "--out", tmp_path / "x.mp4")
    assert code == 1 and "holds no checkpoint" in err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{}")
    code, _, err = call(capsys, "generate", tmp_path / "run", "--prompt", "a", "--out", tmp_path / "x.mp4")
    assert code == 1 and error_line(err).endswith(
        f"yet; continue it with `mla-convert run --out {tmp_path / 'run'} --resume`"
    )
    code, _, err = call(capsys, "inspect", tmp_path / "run")
    assert code == 1 and "is a run folder; name a model in it with --subfolder" in error_line(err)
    assert not (tmp_path / "x.mp4").exists()


def start(folder: Path, out: Path) -> Python:
    """A process that makes a video without an end."""
    return Python("-m", "mla_convert", "generate", folder, "--prompt", "7", "--endless", "--steps", "1", "--out", out)


def interrupted(process: Python, ready: Any, number: int = signal.SIGINT) -> Done:
    """Press Ctrl-C, which signals the whole process group, as soon as `ready()`."""
    for _ in range(1200):
        if ready() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, number)
    return process.finish(120)


def is_written(folder: Path, name: str) -> bool:
    """Whether a part of the file or the folder `name` is there; a file without content is one that is to be opened."""
    return any(path.is_dir() or path.stat().st_size for path in folder.glob(f".{name}.*.tmp"))


@pytest.mark.parametrize("name", ["video.mp4", "frames"])
def test_ctrl_c_ends_with_a_playable_file(digits, tmp_path, name):
    done = interrupted(start(digits, tmp_path / name), lambda: is_written(tmp_path, name))
    assert done.code == 130 and "error: interrupted" in done.err, done.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (len(list((tmp_path / name).iterdir())) if name == "frames" else frames_of(tmp_path / name)) > 0


def test_sigterm_finishes_the_video_too(digits, tmp_path):
    process = start(digits, tmp_path / "video.mp4")
    done = interrupted(process, lambda: is_written(tmp_path, "video.mp4"), signal.SIGTERM)
    assert done.code == 143 and "error: terminated" in done.err, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"] and frames_of(tmp_path / "video.mp4") > 0


def test_a_pipe_gets_the_video_while_it_is_made(digits, tmp_path):
    """The reader gets the first fragments of an endless video and then stops it."""
    options = ["--prompt", "7", "--endless", "--steps", "1", "--out", "-"]
    command = [sys.executable, "-m", "mla_convert", "generate", str(digits), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    (tmp_path / "cut.mp4").write_bytes(process.stdout.read(1 << 16))
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and b"Traceback" not in err
    assert frames_of(tmp_path / "cut.mp4") > 8
