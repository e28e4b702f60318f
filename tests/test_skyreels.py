"""SkyReels-V2: our forms compared with diffusers' model and pipeline under the same mask, and a run to its rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pico
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from recipe_case import digests
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla_convert.cli import main
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.errors import UserError
from mla_convert.families import wan_files
from mla_convert.families.skyreels_v2 import CausalSkyReelsV2Transformer3DModel
from mla_convert.load import load_dense, load_source
from mla_convert.load.weights import WEIGHTS

# Relative to the largest magnitude; the largest error seen on a CPU stands beside each.
FLOAT32 = 2e-6  # 2.6e-7
# After the denoising steps of a pipeline, whose UniPC solver takes differences of predictions.
PIPELINE = 1e-5  # 1.1e-6

# Heads, channels of a head, and whether the frame rate is a condition.
SHAPES = [(1, 16, True), (2, 12, True), (3, 20, False)]
RECIPE = """
version: 1
name: pico
source:
  model: {source}
causal:
  num_frames_per_block: 2
  window_frames: 6
  sink_frames: 2
data:
  kind: latents
  folder: {data}
  heldout: 4
convert:
  kv_lora_rank: 12
  calibration:
    clips: 4
    batch_size: 2
distill:
  - stage: match_velocity
    steps: 2
    learning_rate: 1e-3
    batch_size: 2
    tracker: null
evaluate:
  clips: 2
  batch_size: 2
  rollout_prompts: 0
  long_factor: 0
export:
  dtype: bfloat16
"""


def dense_model(heads: int = 2, head_dim: int = 12, block: int = 5, **changes: Any) -> Any:
    """Dense, with absolute positions and a window longer than any clip here."""
    causal = {"num_frames_per_block": block, "window_frames": 40}
    return pico.dense_model(heads, head_dim, causal=causal, family="skyreels_v2", **changes)


def stock_copy(dense: Any, block: int = 1) -> SkyReelsV2Transformer3DModel:
    settings = {k: v for k, v in dense.config.items() if not k.startswith("_") and k != "causal"}
    stock = SkyReelsV2Transformer3DModel(**settings).eval().requires_grad_(False)
    stock.load_state_dict(dense.state_dict())
    stock._set_ar_attention(block)
    return stock


def stock_forcing(stock: Any, latents: Tensor, timestep: Tensor, text: Tensor, fps: list[int]) -> Tensor:
    """Diffusion forcing item by item, because with a frame rate the stock code only takes batches of one."""
    items = zip(latents.split(1), timestep.split(1), text.split(1), fps, strict=True)
    return torch.cat([stock(x, t, y, enable_diffusion_forcing=True, fps=[rate]).sample for x, t, y, rate in items])


@pytest.mark.parametrize("inject", [True, False])
def test_the_parameters_are_those_of_the_stock_model(inject: bool) -> None:
    dense = dense_model(inject_sample_info=inject)
    stock = stock_copy(dense)
    assert list(dense.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in stock.named_parameters()]


@pytest.mark.parametrize(("heads", "head_dim", "inject"), SHAPES)
def test_one_chunk_equals_the_stock_forward_without_a_mask(heads: int, head_dim: int, inject: bool) -> None:
    dense = dense_model(heads, head_dim, inject_sample_info=inject)
    latents, per_frame, text = pico.inputs(2, 5, 6, 10)
    timestep, fps = torch.tensor([250.0, 800.0]), torch.tensor([0, 1])
    stock = stock_copy(dense)
    expected = stock(latents, timestep, text, fps=[0, 1]).sample
    assert pico.relative_error(dense(latents, timestep, text, fps=fps).sample, expected) < FLOAT32
    expected = stock_forcing(stock, latents, per_frame, text, [0, 1])
    assert pico.relative_error(dense(latents, per_frame, text, fps=fps).sample, expected) < FLOAT32


@pytest.mark.parametrize("block", [2, 3, 5])
@pytest.mark.parametrize(("heads", "head_dim", "inject"), SHAPES)
def test_whole_clip_and_stream_equal_the_stock_forward_under_the_mask(
    heads: int, head_dim: int, inject: bool, block: int
) -> None:
    dense = dense_model(heads, head_dim, block, inject_sample_info=inject)
    latents, timestep, text = pico.inputs(2, 4 * block, 6, 4)
    expected = stock_forcing(stock_copy(dense, block), latents, timestep, text, [0, 1])
    fps = torch.tensor([0, 1])
    assert pico.relative_error(dense(latents, timestep, text, fps=fps).sample, expected) < FLOAT32
    streamed, cache = pico.stream(dense, latents, timestep, text, fps=fps)
    assert pico.relative_error(streamed, expected) < FLOAT32
    assert cache.frames_seen == 4 * block


@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
@pytest.mark.parametrize("case", range(4), ids=["rotate_on_read", "derived", "decoupled", "baked"])
def test_converted_at_full_rank_equals_the_stock_forward_under_the_mask(case: int, own_chunk: str) -> None:
    dense = dense_model(block=3)
    model = pico.convert(dense, **pico.lossless(2, 12, own_chunk)[case])
    latents, timestep, text = pico.inputs(2, 9, 6, 4)
    expected = stock_forcing(stock_copy(dense, 3), latents, timestep, text, [1, 0])
    streamed, _ = pico.stream(model, latents, timestep, text, fps=torch.tensor([1, 0]))
    assert pico.relative_error(streamed, expected) < FLOAT32


def test_the_frame_rate_matters_and_is_24_by_default() -> None:
    dense = dense_model()
    clip = pico.inputs(2, 10, 6, 4)
    slow, fast = (dense(*clip, fps=torch.full((2,), index)).sample for index in (0, 1))
    assert torch.equal(dense(*clip).sample, fast)
    assert pico.relative_error(slow, fast) > 1e-2


def test_the_frame_rate_reaches_the_context_of_teacher_forcing() -> None:
    """Packed with its clean context, each item equals its result with a cache of clean chunks."""
    dense, fps = dense_model(block=2), torch.tensor([0, 1])
    clean, _, text = pico.inputs(2, 4, 6, 4)
    noisy, timestep, _ = pico.inputs(2, 4, 6, 4, seed=3)
    packed = dense(noisy, timestep, text, context=clean, fps=fps).sample
    cache = dense.init_cache(2, 6, 4)
    dense.forward_chunk(clean[:, :, :2], torch.zeros(2), text, cache, write=True, fps=fps)
    last = dense.forward_chunk(noisy[:, :, 2:], timestep[:, 2:], text, cache, fps=fps)
    assert pico.relative_error(last, packed[:, :, 2:]) < FLOAT32


def test_stock_quirks() -> None:
    """What diffusers' model refuses and ours supports: batches with a frame rate, and a short last chunk."""
    dense = dense_model(block=2)
    stock = stock_copy(dense, 2)
    latents, timestep, text = pico.inputs(2, 4, 6, 4)
    with pytest.raises(RuntimeError, match="must match the size"):
        stock(latents, timestep, text, enable_diffusion_forcing=True, fps=[1, 1])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        stock(latents[:1, :, :3], timestep[:1, :3], text[:1], enable_diffusion_forcing=True, fps=[1])
    assert dense(latents[:, :, :3], timestep[:, :3], text).sample.shape == (2, 2, 3, 6, 4)


def test_default_chunks_are_those_of_the_stock_configuration() -> None:
    def default(block: int) -> tuple[int, int | None, int]:
        model = pico.BUILDERS["skyreels_v2"](num_frame_per_block=block, num_attention_heads=2, attention_head_dim=12)
        return model.causal.num_frames_per_block, model.causal.window_frames, model.config.num_frame_per_block

    assert default(3) == (3, 25, 3)
    assert default(30) == (30, 30, 30)
    # The stock model has no mask at 1, and the pipeline's documentation recommends 5.
    assert default(1) == (5, 25, 5)


def test_the_pipeline_may_set_the_chunks() -> None:
    dense = pico.dense_model(family="skyreels_v2")
    dense._set_ar_attention(4)
    assert (dense.causal.num_frames_per_block, dense.causal.window_frames, dense.causal.sink_frames) == (4, 5, 1)
    again = CausalSkyReelsV2Transformer3DModel.from_config(dense.config)
    assert (again.causal, again.config.num_frame_per_block) == (dense.causal, 4)
    with pytest.raises(ValueError, match="window_frames=5 cannot hold sink_frames=1 and one chunk"):
        dense._set_ar_attention(5)


def write_stock(folder: Path, shard_size: str = "5GB", **changes: Any) -> SkyReelsV2Transformer3DModel:
    """A stock model as diffusers writes it, with patches of 2x2, 2 latent channels and text of 8 channels."""
    stock = stock_copy(dense_model(**changes))
    stock.save_pretrained(folder, max_shard_size=shard_size)
    return stock


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_stock_folder_loads(tmp_path: Path, shard_size: str) -> None:
    stock = write_stock(tmp_path / "model", shard_size)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 2) == (shard_size == "20KB")
    source = load_source(str(tmp_path / "model"))
    assert source.family.name == "skyreels_v2"
    assert source.geometry.dense_scalars_per_token == 48
    dense = load_dense(source).requires_grad_(False)
    clip = pico.inputs(1, 5, 6, 4)
    assert pico.relative_error(dense(*clip).sample, stock_forcing(stock, *clip, [1])) < FLOAT32


def test_a_file_without_a_configuration_is_told_by_its_frame_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stock(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / "alone.safetensors")
    monkeypatch.setattr(wan_files, "PUBLISHED_HEADS", {24: 2})
    source = load_source(str(tmp_path / "alone.safetensors"))
    assert source.family.name == "skyreels_v2"
    assert source.config["inject_sample_info"]


def test_image_to_video_models_are_refused_by_name(tmp_path: Path) -> None:
    settings = pico.WAN | {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    stock = SkyReelsV2Transformer3DModel(**settings, image_dim=8, added_kv_proj_dim=24)
    stock.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="with image_dim and added_kv_proj_dim is an image-to-video model") as caught:
        load_source(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pipeline() -> SkyReelsV2DiffusionForcingPipeline:
    """The stock pipeline, with a VAE of 2 latent channels; prompts are given as embeddings."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], z_dim=2, num_res_blocks=1, latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    made = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=stock_copy(dense_model()), vae=vae.eval(), scheduler=scheduler
    )
    made.set_progress_bar_config(disable=True)
    return made


STEPS, PROMPT = 4, torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(5))


def video(pipeline: SkyReelsV2DiffusionForcingPipeline, transformer: Any, **changes: Any) -> Tensor:
    """Latents of one call with guidance: 13 frames of 32x32, which are 4 latent frames."""
    call = {"num_frames": 13, "num_inference_steps": STEPS, "ar_step": 1, "causal_block_size": 2}
    call |= {"height": 32, "width": 32, "output_type": "latent"}
    embeds = {"prompt_embeds": PROMPT, "negative_prompt_embeds": torch.zeros(1, 3, 8)}
    pipeline.register_modules(transformer=transformer)
    generator = torch.Generator().manual_seed(7)
    frames: Tensor = pipeline(None, **embeds, **(call | changes), generator=generator).frames
    return frames


LONG = {"num_frames": 29, "base_num_frames": 13, "overlap_history": 5, "addnoise_condition": 20}


@pytest.mark.parametrize("changes", [{}, {"fps": 16}, {"ar_step": 0}, LONG], ids=["async", "16fps", "sync", "long"])
def test_the_stock_pipeline_gives_the_stock_video_with_our_models(
    pipeline: SkyReelsV2DiffusionForcingPipeline, changes: dict[str, Any]
) -> None:
    dense = dense_model()
    latent = pico.convert(dense, **pico.lossless(2, 12, "exact")[0])
    videos = []
    for transformer in (stock_copy(dense), dense, latent):
        torch.manual_seed(0)  # the noise on the history comes from the global generator
        videos.append(video(pipeline, transformer, **changes))
    for other in videos[1:]:
        assert pico.relative_error(other, videos[0]) < PIPELINE


def test_blocks_one_after_the_other_are_a_rollout_from_our_cache(pipeline: SkyReelsV2DiffusionForcingPipeline) -> None:
    """With `ar_step` equal to all steps, the pipeline begins a block when the one before it is done."""
    dense = dense_model(block=2)
    one_by_one = {"num_frames": 21, "ar_step": STEPS, "guidance_scale": 1.0}
    expected = video(pipeline, stock_copy(dense), **one_by_one)
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    for model in (dense, pico.convert(dense, **pico.lossless(2, 12, "exact")[0])):
        cache, chunks = model.init_cache(1, *expected.shape[3:]), []
        for start, stop in model.causal.chunks(expected.shape[2]):
            chunk, scheduler = (
                noise[:, :, start:stop].clone(),
                UniPCMultistepScheduler.from_config(pipeline.scheduler.config),
            )
            scheduler.set_timesteps(STEPS)
            for t in scheduler.timesteps:
                velocity = model.forward_chunk(chunk, t.expand(1, stop - start), PROMPT, cache)
                # In place as in the pipeline, which so overwrites the sample that the solver kept.
                chunk.copy_(scheduler.step(velocity, t, chunk, return_dict=False)[0])
            model.forward_chunk(chunk, torch.zeros(1, stop - start), PROMPT, cache, write=True)
            chunks.append(chunk)
        assert pico.relative_error(torch.cat(chunks, dim=2), expected) < PIPELINE
    assert pico.relative_error(video(pipeline, stock_copy(dense), **one_by_one | {"ar_step": 0}), expected) > 1e-2


def test_a_saved_pipeline_loads_our_class(pipeline: SkyReelsV2DiffusionForcingPipeline, tmp_path: Path) -> None:
    model = pico.convert(dense_model(block=2), kv_lora_rank=12)
    before = video(pipeline, model, output_type="pt")
    assert before.std() > 0.01
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    assert type(loaded.transformer) is diffusers.MLASkyReelsV2Transformer3DModel
    loaded.set_progress_bar_config(disable=True)
    assert pico.relative_error(video(loaded, loaded.transformer, output_type="pt"), before) < PIPELINE


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock source, latents and a finished run."""
    root = tmp_path_factory.mktemp("skyreels")
    write_stock(root / "source" / "transformer")
    latents, _, text = pico.inputs(12, 8, 6, 4)
    write_latents(root / "data", [Clip(clip, prompt) for clip, prompt in zip(latents, text, strict=True)])
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=root / "source", data=root / "data"))
    assert main(["run", str(recipe), "--out", str(root / "run")]) == 0
    return {"source": root / "source", "data": root / "data", "recipe": recipe, "run": root / "run"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """The JSON object that a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_run_ends_in_a_checkpoint_that_rolls_out(
    case: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = case["run"]
    report = json.loads((run / "report.json").read_text())
    assert (report["dense_scalars_per_token"], report["latent_scalars_per_token"]) == (48, 12)
    assert report["student_loss"] > 0

    save_file({"prompt_embeds": torch.randn(3, 8)}, tmp_path / "embeds.safetensors")
    out = tmp_path / "video.safetensors"
    asked = ["--prompt-embeds", tmp_path / "embeds.safetensors", "--frames", 20, "--steps", 2, "--latent-size", "6x4"]
    assert printed(capsys, "generate", run, "--out", out, *asked)["frames"] == 20
    latents = load_file(out)["latents"]
    assert latents.shape == (2, 20, 6, 4)
    assert latents.isfinite().all()

    model = diffusers.MLASkyReelsV2Transformer3DModel.from_pretrained(
        run / "checkpoint" / "transformer", dtype=torch.bfloat16
    )
    assert model.mla.kv_lora_rank == (12, 12)
    assert (model.config.num_frame_per_block, model.causal.window_frames) == (2, 6)
    assert model.config.inject_sample_info
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == model.state_dict().keys()


def test_plan_inspect_and_convert_take_the_source_folder(
    case: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = printed(capsys, "plan", case["source"], "--latent-size", "6x4")
    assert plan["dense_scalars_per_token"] == 48
    inspected = printed(capsys, "inspect", case["source"], "--data", case["data"], "--clips", 4, "--ranks", "12,24")
    assert len(inspected["layers"]) == 2
    printed(capsys, "convert", case["recipe"], "--out", tmp_path / "run")
    stage = Path("stages", "00-convert", "transformer")
    assert digests(tmp_path / "run" / stage) == digests(case["run"] / stage)
