"""AnyFlow-FAR: our forms compared with diffusers' model and pipeline, and with each other."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model
from mla_convert.errors import UserError
from mla_convert.evaluate.geometry import from_model, preset
from mla_convert.evaluate.memory import plan
from mla_convert.families.anyflow_far import CACHE, FAMILY
from mla_convert.families.far import FarCache, FarGrid
from mla_convert.load import load_dense, load_source
from mla_convert.run.anyflow_far import StreamingAnyFlowFARPipeline

# Relative to the largest magnitude; the largest error seen on a CPU stands beside each.
FLOAT32 = 2e-6  # 3.3e-7
# After the denoising steps of a pipeline.
PIPELINE = 5e-6  # 1.8e-7

HEIGHT, WIDTH = 8, 12
PARTITIONS: list[dict[str, Any]] = [
    {"chunk_partition": (1, 2, 2, 2, 2, 1), "full_chunk_limit": 3},
    {"chunk_partition": (3, 1, 2, 3), "full_chunk_limit": 2, "deltatime_type": "t-r"},
]
WINDOWS: list[dict[str, Any]] = [
    {"num_frames_per_block": 2, "window_frames": 13, "independent_first_frame": True},
    {"num_frames_per_block": 2, "window_frames": 9, "sink_frames": 1, "independent_first_frame": True},
    {"num_frames_per_block": 1, "window_frames": 4},
    {"num_frames_per_block": 3, "window_frames": 13, "sink_frames": 3},
]


def dense_model(causal: dict[str, Any] | None = WINDOWS[0], **changes: Any) -> Any:
    return pico.dense_model(family="anyflow_far", causal=causal, **changes)


def pipeline(transformer: Any, kind: Any = StreamingAnyFlowFARPipeline) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=2, dim_mult=[1, 1, 1, 1], latents_mean=[0.0] * 2, latents_std=[1.0] * 2)
    made = kind(None, None, transformer, vae, FlowMapEulerDiscreteScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def generate(made: Any, partition: tuple[int, ...], guided: bool = True, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 1, 3, 8, generator=generator)
    call: dict[str, Any] = {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1] if guided else None,
        "guidance_scale": 2.0 if guided else 1.0,
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "num_frames": 4 * (sum(partition) - 1) + 1,
        "num_inference_steps": 3,
        "chunk_partition": list(partition),
        "output_type": "latent",
        "generator": generator,
    }
    frames: Tensor = made(**(call | changes)).frames
    return frames


@pytest.fixture(scope="module", params=range(len(PARTITIONS)))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, tuple[int, ...]]:
    """The stock model, our dense form of the same weights, and the chunks."""
    settings = PARTITIONS[request.param]
    dense = dense_model(None, heads=2 + request.param, **settings)
    known = {k: v for k, v in dense.config.items() if not k.startswith("_") and k != "causal"}
    stock = AnyFlowFARTransformer3DModel(**known).eval().requires_grad_(False)
    stock.load_state_dict(dense.state_dict())
    return stock, dense, settings["chunk_partition"]


def test_the_dense_form_gives_what_the_stock_pipeline_gives(pair: Any) -> None:
    """Without a condition, from an image, from a video, without guidance, and with steps by velocity alone."""
    stock, dense, partition = pair
    cases: list[dict[str, Any]] = [{}, {"video_latents": torch.randn(1, 1, 2, HEIGHT, WIDTH)}]
    if partition == PARTITIONS[0]["chunk_partition"]:
        video = torch.rand(1, 9, 3, 8 * HEIGHT, 8 * WIDTH)
        cases += [{"video": video}, {"guided": False}, {"use_mean_velocity": False}]
    for case in cases:
        expected = generate(pipeline(stock, AnyFlowFARPipeline), partition, **case)
        assert pico.relative_error(generate(pipeline(dense), partition, **case), expected) < PIPELINE
        inside = generate(pipeline(dense, AnyFlowFARPipeline), partition, **case)
        assert pico.relative_error(inside, expected) < PIPELINE


@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
@pytest.mark.parametrize("case", range(4), ids=["rotate_on_read", "derived", "decoupled", "baked"])
def test_full_rank_gives_what_the_stock_pipeline_gives(pair: Any, case: int, own_chunk: str) -> None:
    _, dense, partition = pair
    expected = generate(pipeline(dense), partition)
    model = convert(
        dense, frames=sum(partition), **pico.lossless(dense.config.num_attention_heads, 12, own_chunk)[case]
    )
    assert pico.relative_error(generate(pipeline(model), partition), expected) < PIPELINE
    assert pico.relative_error(generate(pipeline(model, AnyFlowFARPipeline), partition), expected) < PIPELINE


def test_the_zero_keys_of_stock_inference_matter(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few tokens they get most of the attention, so the result differs without them."""
    _, dense, partition = pair
    expected = generate(pipeline(dense), partition)
    monkeypatch.setattr(FarGrid, "zero_keys", lambda self, frames: 0)
    assert pico.relative_error(generate(pipeline(dense), partition), expected) > 1e-2


def convert(dense: Any, frames: int = 9, **settings: Any) -> Any:
    calibration = {"clips": 8, "batch_size": 4, "queries_per_chunk": 8}
    clips = [pico.inputs(4, frames, HEIGHT, WIDTH, seed) for seed in (10, 11)]
    batches = [CalibrationBatch(latents, text) for latents, _, text in clips]
    return convert_model(FAMILY, dense, ConvertConfig(calibration=calibration, **settings), batches)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_dense_cache_is_never_allocated() -> None:
    partition = PARTITIONS[0]["chunk_partition"]
    dense = dense_model(None, ffn_dim=4, **PARTITIONS[0])
    model = convert(dense, kv_lora_rank=4, position="rotate_on_read")
    # Key and value, both halves of guidance, three chunks of two frames of 24 tokens, 24 channels.
    dense_elements = 2 * 2 * 3 * 2 * 24 * 24
    largest = {}
    for kind in (StreamingAnyFlowFARPipeline, AnyFlowFARPipeline):
        made = pipeline(model, kind)
        with LargestTensor() as seen:
            generate(made, partition)
        largest[kind] = seen.elements
    assert largest[AnyFlowFARPipeline] >= dense_elements > largest[StreamingAnyFlowFARPipeline]


def test_the_stock_pipeline_loses_its_dense_cache_at_the_first_step() -> None:
    model = dense_model(None, **PARTITIONS[0])
    holder: dict[Any, Any] = {
        layer: {"full_cache": torch.zeros(2, 1, 2, 3 * 2 * 24, 12), "compressed_cache": torch.zeros(2, 1, 2, 48, 12)}
        for layer in range(2)
    }
    latents, timestep, text = pico.inputs(1, 1, HEIGHT, WIDTH)
    flag = {"is_cache_step": False, "num_cached_chunks": 0}
    model(latents.transpose(1, 2), timestep, text, chunk_partition=[1], kv_cache=holder, kv_cache_flag=flag)
    assert list(holder) == [CACHE]
    # Compressed frames have 6 tokens, full ones 24, of which two chunks of two are kept; rows of key and value.
    assert holder[CACHE].bytes() == 2 * 4 * 48 * (8 * 6 + 4 * 24)


def rollout(model: Any, clip: tuple[Tensor, ...], context: Tensor, r_timestep: Tensor) -> tuple[Tensor, FarCache]:
    """Velocity chunk by chunk, each with clean history."""
    latents, timestep, text = clip
    cache, velocities = model.init_cache(len(latents), HEIGHT, WIDTH), []
    for a, b in model.causal.chunks(latents.shape[2]):
        conditions = {"r_timestep": r_timestep[:, a:b]}
        velocities.append(model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, cache, **conditions))
        clean = torch.zeros(len(latents), b - a)
        model.forward_chunk(context[:, :, a:b], clean, text, cache, write=True)
    return torch.cat(velocities, dim=2), cache


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_streaming_equals_the_whole_clip(variant: dict[str, Any] | None, window: dict[str, Any]) -> None:
    model = dense_model(window)
    if variant is not None:
        model = convert(model, **variant)
    clip = pico.inputs(2, 13, HEIGHT, WIDTH)
    context = pico.inputs(2, 13, HEIGHT, WIDTH, seed=9)[0]
    r_timestep = clip[1] * torch.rand(clip[1].shape)
    streamed, cache = rollout(model, clip, context, r_timestep)
    whole = model(*clip, context=context, r_timestep=r_timestep).sample
    assert pico.relative_error(whole, streamed) < FLOAT32
    assert cache.frames_seen == 13
    # A clip's copies share one context.
    doubled = [torch.cat([x, x.flip(2) if x.ndim == 5 else x]) for x in clip]
    first = model(*doubled, context=context, r_timestep=r_timestep.repeat(2, 1)).sample[:2]
    assert pico.relative_error(first, whole) < FLOAT32


def test_a_chunk_whose_encoding_failed_may_be_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model(WINDOWS[0])
    latents, timestep, text = pico.inputs(1, 5, HEIGHT, WIDTH)
    encode, calls = type(model)._encode, iter(range(100))

    def failing(*args: Any, **more: Any) -> Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        out: Tensor = encode(*args, **more)
        return out

    caches = []
    for fails in (False, True):
        cache = model.init_cache(1, HEIGHT, WIDTH)
        for start, stop in model.causal.chunks(5):
            chunk = latents[:, :, start:stop], timestep[:, start:stop], text, cache
            with torch.no_grad():
                if fails and start == 0:
                    monkeypatch.setattr(type(model), "_encode", failing)
                if fails and start > 0 and len(cache.bounds) == 1:
                    with pytest.raises(torch.OutOfMemoryError):
                        model.forward_chunk(*chunk, write=True)
                model.forward_chunk(*chunk, write=True)
        caches.append(cache)
    assert caches[0].bounds == caches[1].bounds and len(caches[0].recent) == len(caches[1].recent)
    for first, second in zip(caches[0].rows, caches[1].rows, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("window", WINDOWS[1:], ids=str)
def test_a_long_rollout_stays_in_its_window(window: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = dense_model(window), [0]
    clip = pico.inputs(1, 40, HEIGHT, WIDTH)
    indices = type(model.causal).temporal_index

    def watched(causal: Any, frames: list[int], stop: int) -> list[int]:
        found = indices(causal, frames, stop)
        seen.extend(found)
        return found

    monkeypatch.setattr(type(model.causal), "temporal_index", watched)
    _, cache = rollout(model, clip, clip[0], clip[1])
    assert max(seen) < window["window_frames"] == model.causal.window_frames
    assert cache.frames_seen == 40
    assert len(cache.recent) == 3


def test_what_is_cached_is_what_is_advertised() -> None:
    window = WINDOWS[0]
    dense = dense_model(window)
    model = convert(dense, kv_lora_rank=14, qk_rope_head_dim=6, position="decoupled")
    dense_cache, cache = (m.init_cache(3, HEIGHT, WIDTH) for m in (dense, model))
    tokens = 4 * 24 + cache.far_frames * 6
    assert cache.scalars_per_token() == 20
    assert cache.bytes() == 3 * 2 * tokens * 20 * 4
    assert dense_cache.bytes() == 3 * 2 * tokens * 48 * 4


def test_error_falls_with_rank() -> None:
    dense = dense_model(WINDOWS[0])
    clip, context = pico.inputs(2, 13, HEIGHT, WIDTH), pico.inputs(2, 13, HEIGHT, WIDTH, seed=9)[0]
    expected = dense(*clip, context=context).sample
    errors = []
    for rank in (4, 12, 24, 36, 48):
        model = convert(dense, kv_lora_rank=rank, position="rotate_on_read")
        errors.append(float((model(*clip, context=context).sample - expected).square().mean()))
    assert errors == sorted(errors, reverse=True)
    # Observed 1.2e-13.
    assert errors[-1] < 1e-11 < errors[0]


def test_a_stock_folder_converts_and_comes_back(tmp_path: Path) -> None:
    dense = dense_model(None, **PARTITIONS[0])
    known = {k: v for k, v in dense.config.items() if not k.startswith("_") and k != "causal"}
    stock = AnyFlowFARTransformer3DModel(**known)
    stock.load_state_dict(dense.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    source = load_source(str(tmp_path / "stock"))
    assert source.family.name == "anyflow_far"
    loaded = load_dense(source)
    assert loaded.causal.model_dump() == dense.causal.model_dump()
    clip = pico.inputs(2, 10, HEIGHT, WIDTH)
    assert torch.equal(loaded(*clip).sample, dense(*clip).sample)
    model = convert(loaded, kv_lora_rank=20, position="rotate_on_read")
    model.save_pretrained(tmp_path / "mla")
    again = FAMILY.mla_class.from_pretrained(tmp_path / "mla")
    assert pico.relative_error(again(*clip).sample, model(*clip).sample) < FLOAT32


# What the authors' own class writes beside the keys of diffusers' class.
ORIGINAL = {
    "_class_name": "FAR_Wan_Transformer3DModel",
    "init_far_model": True,
    "init_flowmap_model": True,
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
}


def original_folder(path: Path, **changes: Any) -> Path:
    """A folder as the authors' conversion script writes it; a value of None removes a key."""
    dense = dense_model(None, **PARTITIONS[1])
    known = {k: v for k, v in dense.config.items() if not k.startswith("_") and k != "causal"}
    AnyFlowFARTransformer3DModel(**known).save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | ORIGINAL | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


def test_the_authors_own_class_is_read_as_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = original_folder(tmp_path)
    with caplog.at_level(logging.WARNING, "mla_convert"):
        source = load_source(str(folder))
    assert not caplog.records
    stock = AnyFlowFARTransformer3DModel.from_pretrained(folder)
    assert source.family.name == "anyflow_far"
    assert source.config.items() == {k: v for k, v in stock.config.items() if k in source.config}.items()
    assert {"gate_value", "chunk_partition", "full_chunk_limit", "deltatime_type"} <= set(source.config)
    model = load_dense(source)
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_authors_own_class_has_another_default_gate(tmp_path: Path) -> None:
    assert load_source(str(original_folder(tmp_path, gate_value=None))).config["gate_value"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_far_model": False}, "without init_far_model cannot be converted: it is bidirectional"),
        ({"init_far_model": None, "init_flowmap_model": None}, "use AnyFlow-FAR, its causal form"),
        ({"init_flowmap_model": False}, "without init_flowmap_model cannot be converted"),
        ({"added_kv_proj_dim": 8}, "with added_kv_proj_dim, which diffusers' class lacks"),
        ({"qk_norm": "rms_norm"}, "with a qk_norm other than rms_norm_across_heads"),
        ({"chunk_partition": None}, "has no chunk_partition; add the chunks of its training"),
    ],
)
def test_the_authors_own_class_in_other_forms_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = original_folder(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_source(str(folder))
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")
    assert "FAR_Wan_Transformer3DModel" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_chunk_limit": 1}, "full_chunk_limit must be at least 2"),
        ({"compressed_patch_size": (1, 3, 4)}, "not spatial multiples"),
        ({"compressed_patch_size": (2, 4, 4)}, "not spatial multiples"),
        ({"causal": {"num_frames_per_block": 2, "window_frames": 7, "sink_frames": 1}}, "window_frames=7 cannot hold"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pico.dense_model(family="anyflow_far", **changes)


def test_the_form_without_a_cache_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AnyFlowTransformer3DModel"}')
    with pytest.raises(UserError, match="is bidirectional"):
        load_source(str(tmp_path))


def test_calls_that_do_not_fit_say_so() -> None:
    model = dense_model(WINDOWS[0])
    with pytest.raises(ValueError, match="smaller than a compressed patch"):
        model.init_cache(1, 2, 12)
    clip = pico.inputs(1, 4, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="chunk_partition without kv_cache"):
        model(*clip, chunk_partition=[1, 3])
    with pytest.raises(ValueError, match="use_kv_cache=False is not supported"):
        pipeline(model)(use_kv_cache=False)
    window = dataclasses.replace(model.far_window, causal=model.causal.model_copy(update={"window_frames": None}))
    with pytest.raises(ValueError, match="finite window"):
        model.make_cache(window.causal, 1, HEIGHT, WIDTH, torch.float32, "cpu")


def test_plan_counts_compressed_history_as_the_cache_does() -> None:
    model = dense_model(WINDOWS[0])
    geometry, rows = from_model(model, HEIGHT, WIDTH)
    counted = plan(geometry, rows, dtype="float32", gpu="80GB")
    assert counted.dense_cache_bytes == counted.latent_cache_bytes == model.init_cache(1, HEIGHT, WIDTH).bytes()
    published = preset("anyflow-far-1.3b").geometry
    # 6 frames in full and 13 compressed, of 21; 3 more fit where a video ends with a chunk of one frame.
    assert published.cached_tokens(21) == 6 * 1560 + 16 * 390


@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_a_constant_shift_in_time_changes_nothing(variant: dict[str, Any] | None) -> None:
    """Without sinks, indexing the window from 0 only shifts the absolute indices."""
    window, clip = WINDOWS[2], pico.inputs(1, 9, HEIGHT, WIDTH)
    found = []
    for positions in ("window", "absolute"):
        model = dense_model({**window, "sink_positions": positions})
        if variant is not None:
            model = convert(model, frames=4, **variant)
        found.append(rollout(model, clip, clip[0], clip[1])[0])
    assert pico.relative_error(*found) < FLOAT32
