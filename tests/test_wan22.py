"""Wan2.2: two experts that share the noise levels, and a timestep for every token."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import RECIPE, digests, write_teacher
from safetensors.torch import load_file
from test_invariants import stock_copy
from torch import Tensor

from mla_convert import flow
from mla_convert.cli import main
from mla_convert.convert.blocks import SourceBlocks
from mla_convert.convert.clips import CalibrationBatch, enter_clips
from mla_convert.convert.store import TensorStore
from mla_convert.distill.objective import noised_clips
from mla_convert.distill.requests import Stopped
from mla_convert.errors import UsageError, UserError
from mla_convert.export.manifest import read_manifest
from mla_convert.mla.window import CausalConfig
from mla_convert.pipeline import experts as experts_module
from mla_convert.pipeline import run
from mla_convert.pipeline import steps as steps_module
from mla_convert.pipeline.context import Context
from mla_convert.pipeline.experts import load_models, run_experts
from mla_convert.recipe.load import load_recipe, parse_recipe
from mla_convert.recipe.schema import Recipe
from mla_convert.recipe.shipped import find_recipe
from mla_convert.run.stream import stream_chunks

# Relative to the largest magnitude; the largest error seen on a CPU stands beside it.
FLOAT32 = 2e-6  # 2.8e-7
BOUNDARY = 0.875
EXPERTS = {"transformer": (BOUNDARY, 1.0), "transformer_2": (0.0, BOUNDARY)}
ROLLOUTS_OFF = ("generate.prompts=[]", "evaluate.rollout_prompts=0")
SET = ("experts={transformer: [0.875, 1.0], transformer_2: [0.0, 0.875]}", *ROLLOUTS_OFF)
CHUNKS = CausalConfig(num_frames_per_block=3).chunks(300)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with two different experts."""
    folder = tmp_path_factory.mktemp("teacher")
    for index, name in enumerate(EXPERTS):
        write_teacher(folder / name, seed=index)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher: Path) -> Recipe:
    return parse_recipe(RECIPE.format(teacher=teacher), SET)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of both experts."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_experts(recipe, folder)
    return folder


def two_experts() -> list[Any]:
    """Two different models of the same shape with the noise ranges of Wan2.2-T2V-A14B."""
    causal = {"num_frames_per_block": 2, "window_frames": 4, "sink_frames": 1}
    models = [pico.dense_model(causal=causal, seed=seed) for seed in (0, 1)]
    for model, noise_range in zip(models, EXPERTS.values(), strict=True):
        model.noise_range = noise_range
    return models


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_of_a_range_are_those_of_all_that_fall_into_it(shift: float) -> None:
    def drawn(noise_range: tuple[float, float]) -> Tensor:
        return flow.chunk_times(200, CHUNKS, torch.Generator().manual_seed(0), shift, noise_range)

    whole = drawn(flow.ALL_NOISE)
    assert torch.equal(whole, flow.chunk_times(200, CHUNKS, torch.Generator().manual_seed(0), shift))
    for low, high in EXPERTS.values():
        t, expected = drawn((low, high)), whole[(whole >= low) & (whole < high)]
        assert t.min() >= low
        assert t.max() <= high
        for share in (0.25, 0.5, 0.75):
            # The largest difference seen is 0.0034.
            assert float(t.quantile(share)) == pytest.approx(float(expected.quantile(share)), abs=0.02)


def test_training_data_keeps_to_the_range() -> None:
    latents, _, text = pico.inputs(4, 6, 4, 4)
    causal = CausalConfig(num_frames_per_block=2)
    plain, low = (
        noised_clips(latents, text, causal, torch.Generator().manual_seed(0), noise_range=noise_range)
        for noise_range in (flow.ALL_NOISE, (0.0, 0.5))
    )
    assert torch.equal(low.t, plain.t / 2)
    assert torch.equal(low.target, plain.target)


def test_one_chunk_is_the_stock_switch_of_experts() -> None:
    """The loop of `WanPipeline`: `transformer` where t >= boundary, `transformer_2` below it."""
    models = two_experts()
    high, low = (stock_copy(model) for model in models)
    _, _, text = pico.inputs(2, 1, 6, 4)
    (chunk,) = stream_chunks(models, text, 2, 6, 4, num_inference_steps=8, shift=3.0)
    x = torch.randn(2, 2, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    times, used = flow.sampling_times(8, 3.0), []
    for t, t_next in itertools.pairwise(times):
        current = high if 1000 * t >= BOUNDARY * 1000 else low
        used.append(current is high)
        with torch.no_grad():
            x = x + (t_next - t) * current(x, (1000 * t).expand(2), text).sample
    assert used == [True] * 3 + [False] * 5
    assert pico.relative_error(chunk, x) < FLOAT32


def test_both_caches_are_written_and_each_step_reads_its_own() -> None:
    models = two_experts()
    _, _, text = pico.inputs(1, 1, 6, 4)
    settings = {"num_inference_steps": 4, "shift": 5.0, "context_noise": 0.1}
    chunks = list(stream_chunks(models, text, 8, 6, 4, **settings))
    caches = [model.init_cache(1, 6, 4) for model in models]
    generator = torch.Generator().manual_seed(0)
    for chunk in chunks:
        x = torch.randn(chunk.shape, generator=generator)
        for t, t_next in itertools.pairwise(flow.sampling_times(4, 5.0)):
            which = int(t < BOUNDARY)
            v = models[which].forward_chunk(x, (1000 * t).expand(1), text, caches[which])
            x = x + (t_next - t) * v
        assert torch.equal(chunk, x)
        noisy = flow.add_noise(x, torch.randn(x.shape, generator=generator), torch.tensor([0.1]))
        for model, cache in zip(models, caches, strict=True):
            model.forward_chunk(noisy, torch.tensor([100.0]), text, cache, write=True)

    twice = [models[0], pico.dense_model(causal=models[0].causal.model_dump(), seed=0)]
    twice[1].noise_range = EXPERTS["transformer_2"]
    one = torch.cat(list(stream_chunks(models[0], text, 8, 6, 4, **settings)), dim=2)
    assert torch.equal(torch.cat(list(stream_chunks(twice, text, 8, 6, 4, **settings)), dim=2), one)
    assert not torch.equal(torch.cat(chunks, dim=2), one)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts={transformer: [0.9, 1.0], transformer_2: [0.0, 0.875]}", "experts: .* must tile"),
        ("experts={transformer: [0.0, 1.0]}", "two or more experts"),
        ("experts={../x: [0.5, 1.0], y: [0.0, 0.5]}", "experts"),
        ("source.subfolder=transformer", "leave out source.subfolder"),
        ("generate.prompts=[7 moving up]", "generate.prompts needs a rollout, which takes all experts"),
        ("evaluate.rollout_prompts=2", "evaluate.rollout_prompts needs a rollout, which takes all experts"),
        ("convert.calibration.source=rollouts", "rollouts needs a rollout, which takes all experts"),
        ("source.noise_range=[0.5, 0.5]", r"source.noise_range: a noise range must rise within \[0, 1\]"),
    ],
)
def test_experts_that_cannot_be_are_refused(teacher: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_recipe(RECIPE.format(teacher=teacher), [*SET, override])
    assert "\n" not in str(caught.value)


def test_expert_is_a_recipe_of_its_own(recipe: Recipe) -> None:
    part = recipe.expert("transformer_2")
    assert part.name == "pico-transformer_2"
    assert (part.source.subfolder, part.source.noise_range) == ("transformer_2", (0.0, BOUNDARY))
    assert parse_recipe(part.dump()) == part
    assert parse_recipe(recipe.dump()) == recipe
    with pytest.raises(UsageError, match="no expert 'transformer2'; did you mean transformer_2"):
        recipe.expert("transformer2")
    with pytest.raises(UsageError, match="has no experts"):
        part.expert("transformer")


def test_everything_of_an_expert_knows_its_range(recipe: Recipe, finished: Path) -> None:
    for name, (low, high) in EXPERTS.items():
        context = Context(recipe.expert(name), finished / name, lambda *told: None)
        assert context.dense().noise_range == context.load_stage(-1).noise_range == (low, high)
        batch = {key: value.unsqueeze(0) for key, value in context.data.example(0).items()}
        clips = enter_clips(
            SourceBlocks(context.source),
            [CalibrationBatch(batch["latents"], batch["encoder_hidden_states"])],
            context.recipe.convert.calibration,
            TensorStore(),
        )
        t, _ = clips.times[0]
        assert low <= float(t.min()) and float(t.max()) <= high
        report = json.loads((finished / name / "report.json").read_text())
        bins = [middle for middle, _ in report["velocity_rel_error_by_timestep"]]
        assert bins == pytest.approx([0.85, 0.95] if low else [0.05 + 0.1 * i for i in range(9)], abs=1e-6)
        assert read_manifest(finished / name / "checkpoint")["recipe"]["source"]["noise_range"] == [low, high]


def test_failed_expert_goes_on_and_ends_with_the_same_bytes(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, export = tmp_path / "run", steps_module.export

    def failing(checkpoint: Path, out: Path, *more: Any, **options: Any) -> None:
        if "transformer_2" in out.parts:
            raise UserError("the disk is full")
        export(checkpoint, out, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "export", failing)
        with pytest.raises(UserError, match="the disk is full"):
            run_experts(recipe, folder)
    with pytest.raises(UserError, match="transformer is finished; --resume shows its result"):
        run_experts(recipe, folder)
    before = digests(folder / "transformer")
    run_experts(recipe, folder, resume=True)
    assert digests(folder / "transformer") == before
    for name in EXPERTS:
        assert digests(folder / name / "checkpoint") == digests(finished / name / "checkpoint")


def test_what_cannot_work_leaves_no_folder(
    recipe: Recipe, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {"transformer": (0.5, 1.0), "transformer_3": (0.0, 0.5)}
    with pytest.raises(UserError, match="has no folder transformer_3"):
        run_experts(recipe.model_copy(update={"experts": experts}), tmp_path / "run")
    with pytest.raises(UsageError, match="choose --expert transformer or transformer_2"):
        run(recipe, tmp_path / "run")
    # Nor does a signal while the experts are checked.
    monkeypatch.setattr(experts_module, "check_inputs", lambda *given: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(Stopped):
        run_experts(recipe, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_generate_finds_the_experts(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "video.safetensors"
    asked = ["--prompt", "7 moving up-left", "--frames", "6", "--steps", "4", "-o", str(out)]
    assert main(["generate", str(finished), *asked]) == 0
    models = load_models(finished)
    assert [model.noise_range for model in models] == list(EXPERTS.values())
    assert load_file(out)["latents"].shape == (1, 6, 16, 16)
    assert main(["generate", str(finished / "transformer"), *asked]) == 2
    assert "is one of several experts, for noise levels 0.875 to 1" in capsys.readouterr().err


def test_command_line_takes_one_expert(
    teacher: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(RECIPE.format(teacher=teacher))
    asked = ["convert", str(path), "-o", str(folder), "--json", *itertools.chain(*(("--set", entry) for entry in SET))]
    assert main(asked) == 2
    assert "choose --expert transformer or transformer_2" in capsys.readouterr().err
    assert main([*asked, "--expert", "transformer_2"]) == 0
    converted = Path(json.loads(capsys.readouterr().out)["model"])
    assert converted == folder / "transformer_2" / "stages" / "00-convert"
    assert digests(converted / "transformer") == digests(
        finished / "transformer_2" / "stages" / "00-convert" / "transformer"
    )


def test_run_prints_all_experts(
    teacher: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(teacher=teacher))
    overrides = itertools.chain(*(("--set", entry) for entry in SET))
    assert main(["run", str(path), "-o", str(finished), "--resume", "--json", *overrides]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["experts"]) == list(EXPERTS)
    for name, figures in printed["experts"].items():
        assert figures["run"] == str(finished / name)
        assert figures["student_loss"] > 0
    assert (finished / "recipe.resolved.yaml").is_file()


@pytest.mark.parametrize("name", ["wan2.1-14b", "wan2.2-t2v-a14b"])
def test_recipes_of_14b_have_the_papers_share(name: str) -> None:
    """The largest multiple of 16 per layer that does not exceed it."""
    loaded = load_recipe(find_recipe(name))
    share = 2 * 40 * 128 * 224 // 3072 // 16 * 16
    assert loaded.convert.kv_lora_rank == loaded.convert.layers_per_latent * share
    assert loaded.experts == (EXPERTS if name == "wan2.2-t2v-a14b" else None)


def ti2v_model(frames_per_block: int, independent: bool = False) -> Any:
    """A model with the channels of Wan2.2-TI2V-5B but fewer and smaller layers."""
    causal = {"num_frames_per_block": frames_per_block, "window_frames": 6, "independent_first_frame": independent}
    return pico.dense_model(causal=causal, in_channels=48, out_channels=48)


def per_token(first: float, rest: Tensor, frames: int, tokens: int) -> Tensor:
    """Timesteps `[B, S]`: `first` for the first frame's tokens, one of `rest` `[B]` for all others."""
    times = rest.unsqueeze(1).repeat(1, frames * tokens)
    times[:, :tokens] = first
    return times


def test_token_timesteps_equal_the_stock_forward() -> None:
    dense = ti2v_model(4)
    latents = torch.randn(2, 48, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    _, _, text = pico.inputs(2, 1, 4, 6)
    times = per_token(0.0, torch.tensor([250.0, 800.0]), 4, 6)
    stock = stock_copy(dense)(latents, times, text).sample
    assert pico.relative_error(dense(latents, times, text).sample, stock) < FLOAT32
    assert pico.relative_error(dense(latents, times[:, ::6], text).sample, stock) < FLOAT32
    assert pico.relative_error(dense(latents, times[:, -1], text).sample, stock) > 1e-3


def test_streaming_takes_token_timesteps() -> None:
    model = ti2v_model(2, independent=True)
    latents = torch.randn(2, 48, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    _, _, text = pico.inputs(2, 1, 4, 6)
    times = per_token(0.0, torch.tensor([250.0, 800.0]), 7, 6)
    cache, chunks = model.init_cache(2, 4, 6), []
    for a, b in model.causal.chunks(7):
        chunks.append(model.forward_chunk(latents[:, :, a:b], times[:, 6 * a : 6 * b], text, cache, write=True))
    assert pico.relative_error(torch.cat(chunks, dim=2), model(latents, times, text).sample) < FLOAT32
