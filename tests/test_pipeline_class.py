"""`StreamingMLAPipeline`: loading in one line, streaming, and what diffusers users expect from a pipeline."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pico
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image
from recipe_case import write_teacher
from torch import Tensor
from wan_pipeline_case import DIM, write_wan_pipeline

from mla_convert import StreamingMLAPipeline
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.release import export
from mla_convert.families.wan import CausalWanTransformer3DModel
from mla_convert.mla.kernel_settings import KernelSettings
from mla_convert.run.decode import decode_chunks
from mla_convert.run.output import handed_out
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.data import parse_prompt

WAN = {"in_channels": 4, "out_channels": 4, "text_dim": DIM, "causal": {"num_frames_per_block": 1, "window_frames": 4}}
STEPS = {"num_inference_steps": 2, "shift": 3.0, "guidance_scale": 3.0}
RECIPE = {"data": {"kind": "digits"}, "generate": {**STEPS, "fps": 4, "num_frames": 64}}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a digits model in bfloat16, in the form `installed`."""
    folder = tmp_path_factory.mktemp("digits")
    model = load_checkpoint(write_teacher(folder / "teacher"))
    save_checkpoint(model, folder / "checkpoint", {"source": {"model": "zoo:digits"}, "recipe": RECIPE})
    export(folder / "checkpoint", folder / "out", ExportConfig(dtype="bfloat16"))
    return folder / "out"


@pytest.fixture(scope="module")
def digits(exported: Path) -> Any:
    return quiet(StreamingMLAPipeline.from_pretrained(exported, dtype=torch.float32))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with the parts of a tiny Wan pipeline beside it."""
    folder = tmp_path_factory.mktemp("wan")
    write_wan_pipeline(folder / "source")
    model = pico.dense_model(**WAN)
    save_checkpoint(model, folder / "checkpoint", {"source": {"model": str(folder / "source")}})
    export(folder / "checkpoint", folder / "out", ExportConfig(components="copy"))
    return folder / "out"


def expected(model: Any, prompts: list[str], frames: int, **settings: Any) -> Tensor:
    text = torch.stack([parse_prompt(prompt).embedding() for prompt in prompts])
    return torch.cat(list(stream_chunks(model, text, frames, 16, 16, **{**STEPS, **settings})), dim=2)


def test_an_export_loads_in_one_line_and_knows_how_it_is_sampled(exported: Path, digits: Any) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert (index["_class_name"], index["prompt_format"]) == ("StreamingMLAPipeline", "digits")
    pipe = quiet(StreamingMLAPipeline.from_pretrained(exported))
    assert pipe.transformer.dtype == torch.bfloat16
    assert (pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.digits) == (None, None, None, True)
    video = digits("7 moving up", num_frames=7, output_type="latent").frames
    assert torch.equal(video, expected(digits.transformer, ["7 moving up"], 7))


def test_diffusers_finds_the_class_by_itself(exported: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(exported)
    assert type(pipe) is StreamingMLAPipeline is diffusers.StreamingMLAPipeline
    pipe.save_pretrained(tmp_path / "saved")
    again = StreamingMLAPipeline.from_pretrained(tmp_path / "saved")
    state = pipe.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.transformer.state_dict().items())
    assert again.config.sampling == pipe.config.sampling and again.digits


def test_checkpoints_and_standalone_exports_load_too(exported: Path, tmp_path: Path) -> None:
    checkpoint = exported.parent / "checkpoint"
    export(checkpoint, tmp_path / "alone", ExportConfig(form="standalone"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(checkpoint)
    for folder in (checkpoint, tmp_path / "alone", tmp_path / "run", exported.parent / "teacher"):
        pipe = StreamingMLAPipeline.from_pretrained(folder)
        assert type(pipe.transformer) is type(load_checkpoint(checkpoint)) and pipe.digits
        assert (pipe.config.sampling or {}).get("fps") == (None if folder.name == "teacher" else 4)
    with pytest.raises(UserError, match=r"is not loaded by diffusers, so device_map is not supported"):
        StreamingMLAPipeline.from_pretrained(checkpoint, device_map="balanced")
    with pytest.raises(UserError, match="holds no checkpoint"):
        StreamingMLAPipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        StreamingMLAPipeline.from_pretrained("owner/absent")


def test_importing_the_package_is_cheap() -> None:
    """Commands read its version, and must not wait for PyTorch."""
    loaded = "print('torch' in sys.modules)"
    code = f"import mla_convert, sys; {loaded}; mla_convert.StreamingMLAPipeline; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_chunks_of_a_stream_are_the_whole_and_have_no_end(digits: Any) -> None:
    prompts, seeds = ["7 moving up", "3"], [3, 4]
    whole = digits(prompts, num_frames=12, seed=seeds).frames
    assert whole.shape == (2, 12, 16, 16, 3) and whole.dtype == np.float32 and 0 <= whole.min() <= whole.max() <= 1
    stream = digits.stream(prompts, seed=seeds)
    first = [next(stream) for _ in range(4)]
    stream.close()
    np.testing.assert_array_equal(np.concatenate(first, axis=1), whole)
    alone = digits("3", num_frames=12, seed=4).frames
    # Observed: 7.2e-7.
    np.testing.assert_allclose(alone, whole[1:], atol=1e-5)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    np.testing.assert_array_equal(digits(prompts, num_frames=12, generator=generators).frames, whole)


def test_every_form_of_output_is_the_same_video(digits: Any) -> None:
    settings = {"prompt": "7", "num_frames": 5}
    video = digits(**settings, output_type="latent").frames
    assert video.shape == (1, 1, 5, 16, 16)
    array, tensor = digits(**settings).frames, digits(**settings, output_type="pt").frames
    (images,) = digits(**settings, output_type="pil", return_dict=False)[0]
    np.testing.assert_allclose(array[0, ..., 0], (video[0, 0] / 2 + 0.5).clamp(0, 1).numpy(), atol=1e-6)
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert len(images) == 5 and all(isinstance(image, Image.Image) for image in images)
    np.testing.assert_array_equal(np.asarray(images[3]), (array[0, 3] * 255).round().astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_frames_are_those_of_the_video_processor_of_diffusers(
    digits: Any, output_type: str, dtype: torch.dtype
) -> None:
    """Its work on the CPU is done on the pixels' device here, with equal bits."""
    pixels = 1.5 * torch.randn(2, 1, 3, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = pixels.float().expand(-1, 3, -1, -1, -1)
    wanted = VideoProcessor(vae_scale_factor=1).postprocess_video(whole, output_type=output_type)
    (found,) = handed_out((digits._finished(chunk, None, output_type) for chunk in [pixels]), output_type)
    assert type(found) is type(wanted)
    if output_type == "pil":
        found, wanted = np.stack([np.stack(v) for v in found]), np.stack([np.stack(v) for v in wanted])
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


def test_pictures_are_made_by_who_asks_for_them(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known, threads = Image.fromarray, []
    monkeypatch.setattr(Image, "fromarray", lambda x: (threads.append(threading.get_ident()), known(x))[1])
    assert len(list(digits.stream("7", num_frames=6, output_type="pil"))) == 2
    assert set(threads) == {threading.get_ident()} and len(threads) == 6


def test_a_stream_that_is_left_ends_its_thread(digits: Any) -> None:
    before, stream = threading.active_count(), digits.stream("7")
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_prompts_change_at_the_next_border(digits: Any) -> None:
    """Four frames per second in chunks of three, which begin at 0, 0.75, 1.5 and 2.25 seconds."""
    before = digits("7", num_frames=12).frames
    after = digits("7", num_frames=12, prompt_schedule={1.2: "3 moving up"}).frames
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert not np.array_equal(after[:, 6:9], before[:, 6:9])
    np.testing.assert_array_equal(digits("7", num_frames=12, prompt_schedule=[(1.2, "3 moving up")]).frames, after)
    anew = digits("7", num_frames=12, prompt_schedule={1.2: "3 moving up"}, recache=True).frames
    np.testing.assert_array_equal(anew[:, :6], before[:, :6])
    assert not np.array_equal(anew[:, 6:9], after[:, 6:9])


def test_callbacks_see_every_step_and_may_change_it(digits: Any) -> None:
    told: list[tuple[int, float]] = []

    def callback(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        told.append((step, float(timestep)))
        if step == 3:
            pipe.interrupt = True
            return {"latents": torch.ones_like(kwargs["latents"])}
        return kwargs

    frames = digits("7", num_frames=12, callback_on_step_end=callback).frames
    assert told == [(0, 1000.0), (1, 750.0), (2, 1000.0), (3, 750.0)]
    assert frames.shape[1] == 6 and (frames[:, 3:] == 1).all()
    assert (digits.guidance_scale, digits.num_timesteps) == (3.0, 2)
    with pytest.raises(UsageError, match="callbacks get latents, not prompt_embeds"):
        digits("7", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_the_progress_bar_counts_steps(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[Any, int]] = []
    make = type(digits).progress_bar

    def watched(self: Any, iterable: Any = None, total: Any = None) -> Any:
        bar = make(self, iterable, total)
        advance = bar.update
        bar.update = lambda n=1: (bars.append((total, n)), advance(n))
        return bar

    monkeypatch.setattr(type(digits), "progress_bar", watched)
    digits("7", num_frames=6)
    assert bars == [(4, 1)] * 4
    bars.clear()
    stream = digits.stream("7", ahead=0)
    next(stream)
    assert bars == [(None, 1)] * 2


def test_the_next_chunk_is_made_while_one_is_used(digits: Any) -> None:
    here, threads = threading.get_ident(), []
    begun = threading.Event()

    def callback(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> None:
        threads.append(threading.get_ident())
        if step == 2:
            begun.set()

    stream = digits.stream("7", num_frames=9, callback_on_step_end=callback)
    next(stream)
    assert begun.wait(60) and here not in threads
    assert len(list(stream)) == 2


def test_samplers_and_what_they_need(digits: Any) -> None:
    given = {"sampler": "renoise", "denoising_steps": [1000, 500]}
    made = digits("7", num_frames=6, output_type="latent", **given).frames
    assert torch.equal(made, expected(digits.transformer, ["7"], 6, **given))


@pytest.mark.parametrize("family", sorted(pico.BUILDERS))
def test_every_family_streams(family: str) -> None:
    model = pico.dense_model(family=family, causal={"num_frames_per_block": 2, "window_frames": 7})
    pipe = quiet(StreamingMLAPipeline(model))
    text = pico.inputs(2, 1, 8, 4)[2]
    settings = {"num_inference_steps": 1, "height": 64, "width": 32, "prompt_embeds": text, "output_type": "latent"}
    made = pipe(num_frames=13, **settings).frames
    assert made.shape == (2, 2, 4, 8, 4)
    assert torch.equal(made, torch.cat(list(stream_chunks(model, text, 4, 8, 4, num_inference_steps=1)), dim=2))


def test_a_wan_export_reads_text_and_makes_pictures(wan: Path) -> None:
    pipe = quiet(StreamingMLAPipeline.from_pretrained(wan))
    assert (pipe.vae.dtype, pipe.text_encoder.dtype, pipe.transformer.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    size = {"height": 32, "width": 48, "num_inference_steps": 1, "guidance_scale": 2.0}
    made = pipe("a red  square", num_frames=9, negative_prompt="dark", **size).frames
    assert made.shape == (1, 9, 32, 48, 3)

    embeds, negative = pipe.encode_prompt("a red  square"), pipe.encode_prompt("dark")
    again = pipe(num_frames=9, prompt_embeds=embeds, negative_prompt_embeds=negative, **size)
    np.testing.assert_array_equal(again.frames, made)
    stock = WanPipeline(pipe.tokenizer, pipe.text_encoder, None, None)
    with torch.no_grad():
        told, _ = stock.encode_prompt("a red  square", None, False, max_sequence_length=512)
    assert torch.equal(embeds, told)

    begun = pipe("a", num_frames=9, start=Image.new("RGB", (96, 64), (200, 30, 30)), **size).frames
    assert begun.shape == made.shape and not np.array_equal(begun, made)
    half = quiet(StreamingMLAPipeline.from_pretrained(wan, dtype={"vae": torch.bfloat16}))
    assert (half.vae.dtype, half.transformer.dtype) == (torch.bfloat16, torch.float32)
    frames = half("a red  square", num_frames=9, negative_prompt="dark", **size).frames
    # Observed: 0.12, of a random VAE of three channels.
    assert frames.dtype == np.float32 and np.linalg.norm(frames - made) / np.linalg.norm(made) < 0.3

    latents = pipe("a", num_frames=9, output_type="latent", **size).frames
    np.testing.assert_array_equal(
        pipe("a", num_frames=9, start=latents[:, :, :2], **size).frames, pipe("a", num_frames=9, **size).frames
    )


def test_offloading_of_diffusers_reaches_every_part(wan: Path) -> None:
    """`enable_model_cpu_offload` does not work without a GPU, so its hooks are added by hand."""
    pipe = quiet(StreamingMLAPipeline.from_pretrained(wan))
    settings = {"height": 32, "width": 48, "num_inference_steps": 1, "num_frames": 5}
    made = pipe("a red square", **settings).frames
    with pytest.raises(RuntimeError, match="accelerator"):
        pipe.enable_model_cpu_offload()

    hook, pipe._all_hooks = None, []
    called: list[str] = []
    # It puts the hooks on anew, for which it needs the accelerator too.
    pipe.maybe_free_model_hooks = lambda: called.append("free")
    for name in pipe.model_cpu_offload_seq.split("->"):
        part = getattr(pipe, name)
        if part is None:
            continue
        _, hook = cpu_offload_with_hook(part, torch.device("cpu"), prev_module_hook=hook)
        before = part._hf_hook.pre_forward
        part._hf_hook.pre_forward = lambda *given, name=name, before=before, **more: (
            called.append(name),
            before(*given, **more),
        )[1]
        back = hook.offload
        hook.offload = lambda name=name, back=back: (called.append(f"{name} back"), back())
        pipe._all_hooks.append(hook)
    np.testing.assert_array_equal(pipe("a red square", **settings).frames, made)
    # A step and decoding, after which the VAE makes room for the pass that writes, and the next chunk.
    chunk = ["transformer", "vae", "vae back"]
    assert [name for name in called if not name.startswith("text_encoder")][:7] == [*chunk, "transformer", *chunk]
    assert (called[0], called[-1]) == ("text_encoder", "free")


def test_parts_that_are_only_named_are_looked_for_there(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(wan.parent / "checkpoint", tmp_path / "out", ExportConfig(components="none"))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    entry = {"repository": str(wan), "revision": None, "library": "diffusers", "class": "AutoencoderKLWan"}
    index |= {"vae": [None, None], "_components": {"vae": {**entry, "subfolder": "vae"}}}
    (tmp_path / "out" / "model_index.json").write_text(json.dumps(index))
    assert isinstance(StreamingMLAPipeline.from_pretrained(tmp_path / "out").vae, AutoencoderKLWan)
    assert StreamingMLAPipeline.from_pretrained(tmp_path / "out", vae=None).vae is None
    index["_components"]["vae"]["repository"] = str(tmp_path / "gone")
    (tmp_path / "out" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        StreamingMLAPipeline.from_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", [{"vae": ["own_code", "VAE"]}, {"_components": {"vae": {"library": "own_code"}}}])
@pytest.mark.parametrize("form", ["diffusers", "modeling"])
def test_a_module_that_only_the_index_names_is_not_imported(
    named: dict[str, Any], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_code.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": [form, "MLAWanTransformer3DModel"], **named}))
    with pytest.raises(UserError, match="takes vae from 'own_code', which is not diffusers or transformers"):
        StreamingMLAPipeline.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    "named",
    [
        {"vae": "x"},
        {"vae": ["os", "system"]},
        {"vae": ["transformers", "Nothing"]},
        {"_components": {"vae": {"class": "AutoencoderKLWan"}}},
        {"_components": {"vae": {"library": "diffusers", "class": "AutoencoderKLWan"}}},
    ],
)
def test_an_index_that_does_not_name_a_model_is_one_line(digits: Any, named: dict[str, Any], tmp_path: Path) -> None:
    digits.transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match=r"does not say what vae is|has no model class") as caught:
        StreamingMLAPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "a video of 0 seconds has no frames"),
        ({"seconds": 1, "num_frames": 3}, "give num_frames or seconds, not both"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"height": 15}, "a latent of 15x16 does not divide"),
        ({"height": -16}, "a height of -16"),
        ({"sampler": "unipc"}, "sampler: expected 'euler' or 'renoise', got 'unipc'"),
        ({"denoising_steps": [250, 1000]}, "denoising_steps: the steps must fall from at most 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps: input should be greater than or equal to 1, got 0"),
        ({"context_noise": 2.0}, "context_noise: input should be less than or equal to 1, got 2.0"),
        ({"context_noise": -0.5}, "context_noise: input should be greater than or equal to 0"),
        ({"context_noise": math.nan}, "context_noise: expected a finite number, got nan"),
        ({"guidance_scale": -3.0}, "guidance_scale: input should be greater than or equal to 0"),
        ({"fps": 0}, "fps must be more than 0"),
        ({"output_type": "gif"}, "output_type must be np, pt, pil or latent"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": "seven"}, "cannot read the digits prompt 'seven'"),
        ({"prompt": None, "prompt_embeds": torch.zeros(3, 7)}, r"\[B, L, 32\] is expected"),
    ],
)
def test_what_cannot_be_made_is_refused_at_the_call(digits: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        digits.stream(**{"prompt": "7", **settings})
    assert "[" not in str(refused.value).partition(" ")[0]


def test_what_a_pipeline_lacks_is_named() -> None:
    pipe = StreamingMLAPipeline(pico.dense_model(**WAN))
    with pytest.raises(UsageError, match="no text encoder and tokenizer"):
        pipe.stream("a", output_type="latent")
    with pytest.raises(UsageError, match="has no vae"):
        pipe.stream(prompt_embeds=torch.zeros(1, 3, DIM))
    with pytest.raises(UsageError, match="a height of 20 is not a multiple of the VAE's 8"):
        pipe.stream(prompt_embeds=torch.zeros(1, 3, DIM), output_type="latent", height=20)
    with pytest.raises(ValueError, match="does not stream"):
        StreamingMLAPipeline(torch.nn.Linear(2, 2))


def test_decoding_goes_with_the_stream(wan: Path) -> None:
    pipe = quiet(StreamingMLAPipeline.from_pretrained(wan))
    settings = {"height": 32, "width": 48, "num_inference_steps": 1, "num_frames": 13}
    latents = pipe("a", output_type="latent", **settings).frames
    pixels = torch.cat(list(decode_chunks(latents.split(1, dim=2), pipe.vae)), dim=2)
    parts = list(pipe.stream("a", output_type="pt", **settings))
    assert [part.shape[1] for part in parts] == [1, 4, 4, 4]
    torch.testing.assert_close(torch.cat(parts, dim=1).transpose(1, 2), pixels / 2 + 0.5, rtol=0, atol=1e-6)


def test_it_streams_as_the_recipe_says_unless_the_model_was_told(exported: Path) -> None:
    model = CausalWanTransformer3DModel.from_pretrained(exported, subfolder="transformer")
    asked = {"kernels": "torch", "expand_history": "pass", "cuda_graph": "off"}
    kernels = StreamingMLAPipeline(model, streaming=asked).transformer.kernels
    assert kernels.settings == KernelSettings("torch", "pass", False)
    assert StreamingMLAPipeline(model).transformer.kernels is kernels
    loaded = quiet(StreamingMLAPipeline.from_pretrained(exported, streaming=asked))
    assert loaded.transformer.kernels.settings.mode == "torch"
    assert quiet(StreamingMLAPipeline.from_pretrained(exported)).transformer.kernels.settings.mode == "auto"
