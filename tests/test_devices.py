"""Devices of tensors, tested on a simulated GPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import image_case
import numpy as np
import pico
import pretend_gpu
import pytest
import torch
from accelerate import cpu_offload_with_hook
from device_case import CPU, FEW, Clips, model, same
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from pretend_gpu import GPU, pretended
from recipe_case import write_teacher
from test_bench import SMALL
from torch import Tensor, nn
from wan_pipeline_case import DIM, write_wan_pipeline

import mla_convert.run.offload
from mla_convert import StreamingMLAPipeline
from mla_convert.distill.encode.models import encode_pixels, text_encoder, video_vae
from mla_convert.evaluate.bench import BenchConfig, bench
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.fidelity import fidelity, memory
from mla_convert.evaluate.rollouts import digit_rollouts
from mla_convert.evaluate.vbench_suite import Prompt
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.flow import next_sample, sampling_times
from mla_convert.mla import graph
from mla_convert.mla.graph import GraphedChunk
from mla_convert.pipeline import generation
from mla_convert.pipeline.generation import Request, generate_video
from mla_convert.pipeline.vbench import Drawing, VBenchConfig
from mla_convert.run.batch import StreamBatch
from mla_convert.run.decode_memory import decoding_bytes
from mla_convert.run.offload import Weights, place
from mla_convert.run.stream import stream_chunks

WAN = {"in_channels": 4, "out_channels": 4, "text_dim": DIM, "causal": {"num_frames_per_block": 1, "window_frames": 4}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan model with its source, a pipeline with a tiny text encoder and VAE, beside it in `pipeline`."""
    folder = tmp_path_factory.mktemp("wan")
    source = {"source": {"model": str(write_wan_pipeline(folder / "pipeline"))}}
    save_checkpoint(pico.dense_model(layers=1, **WAN), folder / "checkpoint", source)
    Image.new("RGB", (96, 64), (200, 30, 30)).save(folder / "start.png")
    return folder / "checkpoint"


@pytest.fixture(autouse=True)
def unstreamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group offloading without the CUDA streams that overlap its copies."""
    known = mla_convert.run.offload.apply_group_offloading
    monkeypatch.setattr(
        mla_convert.run.offload, "apply_group_offloading", lambda *a, **k: known(*a, **{**k, "use_stream": False})
    )


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with pretended():
        here, there = torch.ones(3, 3), torch.ones(3, 3, device=GPU)
        assert there.device == GPU and (there @ there).device == GPU
        assert here.to(GPU).device == GPU and there.cpu().device.type == "cpu"
        assert there[torch.tensor([0, 2])].shape == (2, 3)
        for mixed in (lambda: here + there, lambda: there.add_(here), lambda: torch.cat([here, there])):
            with pytest.raises(RuntimeError, match="expected all tensors on cuda"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, generator=torch.Generator(), device=GPU)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_a_network_learns_on_the_pretended_gpu_as_it_does_on_the_cpu() -> None:
    def learned(device: torch.device) -> torch.Tensor:
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 3), torch.linspace(-1, 1, 8).view(2, 4).to(device)
        parameters = list(layer.parameters())
        layer.to(device)
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
        return layer.weight.detach().cpu()

    expected = learned(torch.device("cpu"))
    with pretended():
        actual = learned(GPU)
    # Observed no difference.
    torch.testing.assert_close(actual, expected)


def rolled_out(models: list[Any], device: torch.device, offload: str | None = None, **settings: Any) -> Tensor:
    """A guided rollout of two items with a start, a change of the prompt, and a noisy history."""
    models = copy.deepcopy(models)
    if offload is None:
        models = [one.to(device) for one in models]
    else:
        place(models, None, device, offload)  # type: ignore[arg-type]
        settings["device"] = device
    for one in models:
        one.set_kernels("torch", cuda_graph=False)
    start, _, text = pico.inputs(2, models[0].causal.chunk_end(0), 4, 4)
    changed = pico.inputs(2, 1, 4, 4, seed=5)[2]
    settings = {**FEW, "guidance_scale": 2.0, "context_noise": 0.1, "seed": [1, 2], "start": start, **settings}
    made = list(
        stream_chunks(models, text, 7, 4, 4, prompt_at=lambda first: changed if first > 3 else None, **settings)
    )
    assert all(chunk.device == device for chunk in made)
    return torch.cat([chunk.cpu() for chunk in made], dim=2)


@pytest.mark.parametrize("variant", [None, *range(len(pico.VARIANTS))])
def test_every_layout_streams(variant: int | None) -> None:
    same(lambda device: rolled_out([model(variant)], device))


def test_shared_latents_stream() -> None:
    same(lambda device: rolled_out([model(6, layers_per_latent=2)], device, sampler="renoise"))


@pytest.mark.parametrize(
    ("family", "offload"), [("anyflow_far", None), ("anyflow_far", "model"), ("skyreels_v2", "group")]
)
def test_other_families_stream(family: str, offload: str | None) -> None:
    same(lambda device: rolled_out([model(0, family)], device, offload))


def experts() -> list[Any]:
    high, low = copy.deepcopy(model()), copy.deepcopy(model())
    high.noise_range, low.noise_range = (0.5, 1.0), (0.0, 0.5)
    return [high, low]


def test_experts_stream_one_at_a_time() -> None:
    same(lambda device: rolled_out(experts(), device, "model", num_inference_steps=2))


def test_weights_travel_to_the_gpu_and_are_not_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts: the one that took the last step writes first, whether alone or in a batch."""
    models, text = experts(), pico.inputs(1, 1, 4, 4)[2]
    weights = [[x.data_ptr() for x in (*one.parameters(), *one.buffers())] for one in models]
    came: list[int] = []
    bring = Weights.bring

    def brought(self: Weights) -> None:
        if not self.on_device:
            came.append(self.number)
        bring(self)

    monkeypatch.setattr(Weights, "bring", brought)
    with pretended():
        place(models, None, GPU, "model")
        for number, one in enumerate(models):
            one._hf_hook.weights.number = number
        moves, known = [], pretend_gpu._moved

        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = known(x, *args, **kwargs)
            moves.append((x.device.type, y.device.type))
            return y

        monkeypatch.setattr(pretend_gpu, "_moved", moved)
        settings = {"num_inference_steps": 4, "device": GPU}
        list(stream_chunks(models, text, 6, 4, 4, **settings))
        # The last chunk is not written.
        assert came == [0, 1] * 3
        came.clear()
        batch = StreamBatch(models, 1, 4, 4, **settings)
        batch.join(text[0], num_frames=6)
        list(batch.chunks())
        # A round writes every chunk that it makes.
        assert came == [0, *[1, 0] * 3]
        assert ("cpu", "cuda") in moves and ("cuda", "cpu") not in moves
        for one in models:
            one._hf_hook.weights.leave()
    assert [[x.data_ptr() for x in (*one.parameters(), *one.buffers())] for one in models] == weights


def test_a_step_copies_no_times_to_the_gpu() -> None:
    """A number on the CPU is passed with the launch, and gives the same bits as one on the device."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = torch.randn(3, 1, 2, 2, 3, 3, generator=generator)
    for t, t_next in itertools.pairwise(sampling_times(7, 5.0)):
        euler, renoised = x + (t_next - t) * v, (1 - t_next) * (x - t * v) + t_next * noise
        with pretended():
            on_gpu = [one.to(GPU) for one in (x, v, noise)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pretend_gpu, "_moved", lambda *_, **__: pytest.fail("a copy"))
                found = [next_sample(*on_gpu[:2], t, t_next), next_sample(*on_gpu[:2], t, t_next, on_gpu[2])]
            assert all(one.device == GPU for one in found)
            assert [torch.equal(one.cpu(), other) for one, other in zip(found, (euler, renoised), strict=True)]


@pytest.mark.parametrize("offload", [None, "model"])
def test_a_source_on_the_cpu_reaches_a_gpu(offload: Literal["model"] | None) -> None:
    """In a rollout, and in a batch beside streams of another strength and of none."""
    source, _, texts = pico.inputs(3, 7, 4, 4)
    asked = {"source": lambda first, stop: source[:1, :, first:stop], "strength": 0.4}
    same(lambda device: rolled_out([model()], device, offload, start=None, sampler="renoise", **asked))

    def made(device: torch.device) -> list[Tensor]:
        found = copy.deepcopy(model()) if offload else copy.deepcopy(model()).to(device)
        if offload is not None:
            place([found], None, device, offload)
        batch = StreamBatch(found, 4, 4, 4, num_inference_steps=3, device=device)
        batch.join(texts[0], seed=1, guidance_scale=2.0, **asked)
        batch.join(texts[1], seed=2, source=source[1], strength=0.8)
        batch.join(texts[2], seed=3, num_frames=7)
        chunks = list(batch.chunks())
        assert all(chunk.latents.device == device for chunk in chunks)
        return [chunk.latents.cpu() for chunk in chunks]

    same(made)


@pytest.mark.parametrize("offload", [None, "model"])
def test_streams_share_passes(offload: Literal["model"] | None) -> None:
    """Two experts with caches in int8; a stream joins late, and one changes its prompt."""
    start, _, texts = pico.inputs(3, 2, 4, 4)

    def made(device: torch.device) -> list[Tensor]:
        settings = {"num_inference_steps": 2, "context_noise": 0.1, "sampler": "renoise", "cache_dtype": torch.int8}
        models = experts()
        if offload is None:
            models = [one.to(device) for one in models]
        else:
            place(models, None, device, offload)
        batch = StreamBatch(models, 4, 4, 4, device=device, **settings)
        assert {rows.device for cache in batch.pool.caches for rows in cache.rows if rows.numel()} == {device}
        batch.join(texts[0], seed=1, num_frames=6, guidance_scale=2.0, start=start[0])
        chunks = batch.step()
        batch.join(texts[1], seed=2, num_frames=4)
        chunks += batch.step()
        batch.change_prompt(0, texts[2])
        chunks += list(batch.chunks())
        assert all(chunk.latents.device == device for chunk in chunks)
        return [chunk.latents.cpu() for chunk in chunks]

    same(made)


class Counted:
    """A recorder that runs its function and refuses copies from the CPU, as the capture of a graph does."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        run()
        self.run = run
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tensor", "as_tensor", "from_numpy"):
                patch.setattr(torch, name, lambda *_, **__: pytest.fail("a copy from the host"))
            self.out = run()
        return self.out

    def replay(self) -> None:
        self.out.copy_(self.run())


@pytest.mark.parametrize(("family", "variant"), [("wan", 0), ("wan", 7), ("skyreels_v2", None), ("skyreels_v2", 4)])
def test_what_a_graph_captures_copies_nothing_from_the_host(
    family: str, variant: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CUDARecorder", lambda device, beside: Counted())
    found = model(variant, family)
    latents, timestep, text = pico.inputs(1, 2, 4, 4)
    cache = found.init_cache(1, 4, 4)
    with torch.no_grad():
        graphed = GraphedChunk(found, cache)
        # The second chunk of the steady state is the first to be captured.
        while not graphed.graphs:
            assert cache.frames_seen < 12
            graphed(latents, timestep, text)
            found.forward_chunk(latents, timestep, text, cache, write=True)


def pipeline_with(checkpoint: Path, device: torch.device, offload: str | None) -> Any:
    parts = WanPipeline.from_pretrained(checkpoint.parent / "pipeline", transformer=None, scheduler=None)
    return pipeline_of(load_checkpoint(checkpoint), parts, device, offload)


def pipeline_of(model: Any, parts: Any, device: torch.device, offload: str | None) -> Any:
    told = {"streaming": {"kernels": "torch", "cuda_graph": "off"}}
    told |= {name: getattr(parts, name, None) for name in ("image_encoder", "image_processor")}
    pipe = StreamingMLAPipeline(model, parts.vae, parts.text_encoder, parts.tokenizer, **told)
    pipe.set_progress_bar_config(disable=True)
    if offload is None:
        return pipe.to(device)
    # By hand: `enable_model_cpu_offload` asks for an accelerator.
    hook, pipe._all_hooks, pipe.maybe_free_model_hooks = None, [], lambda: None
    for part in (getattr(pipe, name) for name in pipe.model_cpu_offload_seq.split("->")):
        if part is not None:
            _, hook = cpu_offload_with_hook(part, device, prev_module_hook=hook)
            pipe._all_hooks.append(hook)
    return pipe


@pytest.mark.parametrize("offload", [None, "model"])
def test_the_pipeline_reads_text_and_pictures_and_decodes(checkpoint: Path, offload: str | None) -> None:
    def made(device: torch.device) -> Any:
        pipe = pipeline_with(checkpoint, device, offload)
        settings = {**FEW, "height": 32, "width": 48, "num_frames": 9, "fps": 8, "guidance_scale": 2.0}
        start = Image.open(checkpoint.parent / "start.png")
        chunks = list(pipe.stream("a", prompt_schedule={0.3: "square"}, start=start, ahead=1, **settings))
        if offload is not None:
            assert pipe.vae.device == CPU
        # Room for decoding was left before histories were made.
        room = decoding_bytes(pipe.vae, 4, 6)
        assert pipe.transformer.kernels.left_free == (room.total(1) if device == GPU else 0)
        chunks += list(pipe.stream("a", source=[start] * 9, ahead=1, **settings))
        assert pipe.transformer.kernels.left_free > room.total(1) or device == CPU
        if offload is not None:
            assert pipe.vae.device == CPU
        return np.concatenate(chunks, axis=1)

    same(made)


@pytest.mark.parametrize("offload", [None, "model"])
def test_the_pipeline_is_conditioned_on_a_picture(tmp_path: Path, offload: str | None) -> None:
    image_case.write_pipeline(tmp_path)
    model = image_case.model("wan2.1", layers=1, text_dim=DIM, causal=WAN["causal"])

    def made(device: torch.device) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler()
        parts = WanImageToVideoPipeline.from_pretrained(tmp_path, transformer=None, scheduler=scheduler)
        pipe = pipeline_of(copy.deepcopy(model), parts, device, offload)
        settings = {**FEW, "height": 32, "width": 48, "guidance_scale": 2.0, "image": image_case.picture()}
        stream = pipe.stream("a", **settings, ahead=0)
        chunks = [next(stream) for _ in range(3)]
        if offload is not None:
            assert pipe.vae.device == pipe.image_encoder.device == CPU
        return np.concatenate(chunks, axis=1)

    same(made)


@pytest.mark.parametrize("offload", [None, "model"])
def test_conditions_on_the_cpu_reach_a_gpu(offload: Literal["model"] | None) -> None:
    """A stream joins late, with guidance; the other's image comes frame by frame."""
    size = (image_case.HEIGHT, image_case.WIDTH)
    text, given = image_case.text("wan2.1")[0], image_case.conditions("wan2.1", 6)
    image = given["image_latents"]

    def made(device: torch.device) -> list[Tensor]:
        model = image_case.model("wan2.1", layers=1)
        if offload is None:
            model = model.to(device)
        else:
            place([model], None, device, offload)
        batch = StreamBatch(model, 4, *size, device=device, recache=True, **FEW)
        batch.join(text, 1, 6, conditions={**given, "image_latents": lambda a, b: image[:, :, a:b]})
        chunks = batch.step()
        batch.join(text, 2, 4, 2.0, conditions=given)
        batch.change_prompt(0, text + 1)
        chunks += list(batch.chunks())
        return [chunk.latents.cpu() for chunk in chunks]

    same(made)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.device], None]:
    """Sets whether torch sees a GPU."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return lambda device: monkeypatch.setattr(torch.cuda, "is_available", lambda: device == GPU)


@pytest.mark.parametrize(
    ("offload", "given"), [("none", "start"), ("group", "start"), ("none", "source"), ("model", "source")]
)
def test_generate_writes_the_same_pictures(
    checkpoint: Path, tmp_path: Path, available: Any, offload: Any, given: str
) -> None:
    def made(device: torch.device) -> Any:
        available(device)
        streaming = {"kernels": "torch", "cuda_graph": "off"}
        request = Request(("a",), size=(32, 48), offload=offload, streaming=streaming)
        settings = {
            **FEW,
            "num_frames": 2,
            "guidance_scale": 2.0,
            "negative_prompt": "dark",
            given: str(checkpoint.parent / "start.png"),
        }
        out = tmp_path / device.type
        with pytest.MonkeyPatch.context() as patch:
            asked: list[tuple[Any, ...]] = []
            patch.setattr(generation, "reserve", lambda models, vae, *rest: asked.append((vae.config.z_dim, *rest)))
            generate_video(checkpoint, out, request, settings, lambda *_: None)
        ((*sizes, where, encoder),) = asked
        assert (*sizes, where.type) == (4, 4, 6, 1, device.type) and (encoder is None) == (given == "start")
        # Levels of 255, the last of which may be rounded either way.
        return np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())]) / 2550

    same(made)


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_vbench_draws_and_encoders_encode(checkpoint: Path, tmp_path: Path, available: Any, offload: Any) -> None:
    pipeline = checkpoint.parent / "pipeline"

    def made(device: torch.device) -> Any:
        available(device)
        settings = {**FEW, "latent_height": 4, "latent_width": 6, "fps": 2}
        config = VBenchConfig(tmp_path, seconds=1, components=str(pipeline), generate=settings, offload=offload)
        out = tmp_path / device.type
        drawing = Drawing(checkpoint, config, [Prompt("a", (), "a square")], out, lambda *_: None)
        chunks = list(drawing.draw("a square", 0))
        assert len(chunks) == 2
        video = np.concatenate(chunks)
        assert np.array_equal(np.concatenate(list(drawing.draw("a square", 0))), video)
        room = decoding_bytes(drawing.vae, 4, 6).total(1) if device == GPU else 0
        assert [one.kernels.left_free for one in drawing.models] == [room]
        with text_encoder(pipeline, torch.float32, device) as embed, video_vae(pipeline, device) as vae:
            pixels = torch.linspace(-1, 1, 4608).view(1, 3, 1, 32, 48)
            return [torch.from_numpy(video), embed(["red"]), encode_pixels(vae, pixels).cpu()]

    same(made)


@pytest.mark.parametrize("variant", [0, 7])
def test_fidelity_finds_the_same(variant: int) -> None:
    def numbers(found: Any) -> list[float]:
        if isinstance(found, dict):
            found = [found[key] for key in sorted(found)]
        if isinstance(found, list):
            return [number for part in found for number in numbers(part)]
        return [float(found)] if isinstance(found, int | float) else []

    def measured(device: torch.device) -> Tensor:
        student, teacher = (copy.deepcopy(one).to(device) for one in (model(variant), model(None)))
        found = fidelity(student, teacher, Clips(None).heldout(3), batch_size=2, seed=0)
        return torch.tensor(numbers([found, memory(student, teacher, 4, 4)]))

    same(measured)


def test_digits_are_told_and_a_pass_is_timed(tmp_path: Path, available: Any) -> None:
    teacher = write_teacher(tmp_path / "teacher")

    def made(device: torch.device) -> Any:
        available(device)
        times = bench(
            SMALL, BenchConfig(kernels="torch", kv_lora_rank=8, repeats=1, device=str(device), dtype="float32")
        )
        assert times["device"] == "pretended" or device == CPU
        config = EvaluateConfig(rollout_prompts=2, **FEW)
        return list(digit_rollouts(load_checkpoint(teacher, device=device), 4, config))

    same(made)
