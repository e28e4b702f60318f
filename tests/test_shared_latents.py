"""Layers that share a latent: exact at full rank, equal in a clip, a rollout and with kernels, cached once."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mla_attention
import pico
import pytest
import torch
from pydantic import ValidationError
from recipe_case import digests

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model, convert_source
from mla_convert.convert import layers as layers_module
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.initialize import initialize_layers, read_layer
from mla_convert.convert.layers import ranks_of
from mla_convert.convert.probe import LayerSample
from mla_convert.distill.execution import checkpointed
from mla_convert.distill.stages.match_attention import MatchAttention, MatchAttentionConfig
from mla_convert.errors import UsageError
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.export.manifest import family_of
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source
from mla_convert.mla import fused, kernels
from mla_convert.mla.config import MLAConfig
from mla_convert.mla.quantized import dequantize, quantize
from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks

# Relative to the largest magnitude; the largest error seen on a CPU stands beside each.
FLOAT32 = 2e-6
BFLOAT16 = 8e-3

LAYERS, SHARED = 4, 2
LAYOUTS = [
    {"position": "rotate_on_read", "kv_lora_rank": 20, "layers_per_latent": SHARED},
    {"position": "derived", "kv_lora_rank": 20, "qk_rope_head_dim": 8, "layers_per_latent": SHARED},
]
WINDOWS = [
    {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1},
    {"num_frames_per_block": 3, "window_frames": 6},
    {"num_frames_per_block": 2, "window_frames": 7, "sink_frames": 2, "independent_first_frame": True},
]
FAMILIES = ["wan", "skyreels_v2", "anyflow_far"]
FAR = {"chunk_partition": (1, 2, 2, 2), "full_chunk_limit": 3, "compressed_patch_size": (1, 4, 4)}


def dense_model(family: str = "wan", heads: int = 2, **changes: Any) -> Any:
    if family == "anyflow_far":
        changes = {"causal": None, **FAR, **changes}
    return pico.dense_model(heads=heads, layers=LAYERS, family=family, **changes)


def clip_of(family: str, frames: int, batch: int = 2) -> tuple[Any, ...]:
    height, width = (8, 8) if family == "anyflow_far" else (6, 4)
    return pico.inputs(batch, frames, height, width)


@pytest.fixture(scope="module")
def student() -> Any:
    return pico.convert(dense_model(), **LAYOUTS[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [2, 4])
@pytest.mark.parametrize("position", ["rotate_on_read", "derived"])
def test_full_rank_loses_nothing(position: str, shared: int, family: str) -> None:
    dense = dense_model(family)
    inner = 24
    key = {"qk_rope_head_dim": inner, "keep_residual": False} if position == "derived" else {}
    batches = [(x, y) for x, _, y in (clip_of(family, 7, 4),)]
    model = converted(
        dense, batches, position=position, kv_lora_rank=2 * inner * shared, layers_per_latent=shared, **key
    )
    clip = clip_of(family, 7)
    expected = dense(*clip).sample
    assert pico.relative_error(model(*clip).sample, expected) < FLOAT32
    assert model.init_cache(1, *clip[0].shape[3:]).scalars_per_token() == 2 * inner


def converted(dense: Any, batches: list[Any], **settings: Any) -> Any:
    calibration = {"clips": 4, "batch_size": 4, "queries_per_chunk": 8}
    given = [CalibrationBatch(*batch) for batch in batches]
    return convert_model(family_of(type(dense)), dense, ConvertConfig(calibration=calibration, **settings), given)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: v["position"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_streaming_equals_the_whole_clip(window: dict[str, Any], layout: dict[str, Any]) -> None:
    model = pico.convert(dense_model(causal=window), **layout)
    # 17 frames wrap every one of these windows several times and end in a short chunk.
    clip = pico.inputs(3, 17, 2, 6)
    streamed, cache = pico.stream(model, *clip)
    assert pico.relative_error(streamed, model(*clip).sample) < FLOAT32
    assert cache.frames_seen == 17


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_streaming_equals_the_whole_clip_in_other_families(family: str) -> None:
    dense = dense_model(family)
    model = converted(dense, [(x, y) for x, _, y in (clip_of(family, 7, 4),)], **LAYOUTS[0])
    clip = clip_of(family, 7)
    if family == "anyflow_far":
        # A chunk is encoded with what it is written with; what denoises it sees is compared in the packed form.
        latents, timestep, text = clip
        whole = model(latents, timestep, text, context=latents, context_timestep=timestep).sample
        cache, chunks = model.init_cache(2, *latents.shape[3:]), []
        for a, b in model.causal.chunks(7):
            chunks.append(model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, cache))
            model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, cache, write=True)
        assert pico.relative_error(torch.cat(chunks, dim=2), whole) < FLOAT32
        return
    assert pico.relative_error(pico.stream(model, *clip)[0], model(*clip).sample) < FLOAT32


def test_streaming_equals_the_whole_clip_in_bfloat16(student: Any) -> None:
    model = load_like(student).to(torch.bfloat16)
    clip = [x.to(torch.bfloat16) for x in pico.inputs(2, 9, 6, 4)]
    assert pico.relative_error(pico.stream(model, *clip)[0], model(*clip).sample) < BFLOAT16


def load_like(model: Any) -> Any:
    copy = type(model)(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def test_teacher_forcing_equals_a_rollout_over_the_clean_clip(student: Any) -> None:
    """Two noisy copies of each clip with its clean history, packed and chunk by chunk."""
    clean, timestep, text = pico.inputs(2, 9, 6, 4)
    noisy, _, _ = pico.inputs(4, 9, 6, 4, seed=5)
    times = torch.cat([timestep, timestep.flip(0)])
    packed = student(noisy, times, text.repeat(2, 1, 1), context=clean).sample
    cache, chunks = student.init_cache(4, 6, 4), []
    for a, b in student.causal.chunks(9):
        chunks.append(student.forward_chunk(noisy[:, :, a:b], times[:, a:b], text.repeat(2, 1, 1), cache))
        history = clean[:, :, a:b].repeat(2, 1, 1, 1, 1)
        student.forward_chunk(history, torch.zeros(4, b - a), text.repeat(2, 1, 1), cache, write=True)
    assert pico.relative_error(packed, torch.cat(chunks, dim=2)) < FLOAT32


def test_the_latent_is_cached_once(student: Any) -> None:
    assert student.row_widths == [20, 0, 20, 0]
    cache = student.init_cache(3, 6, 4)
    assert cache.scalars_per_token() == student.mla.scalars_per_token() == 10
    assert cache.bytes() == 3 * 5 * 6 * 4 // 4 * 20 * 2 * 4


def test_a_quantized_cache_rounds_the_whole_latent_once(student: Any) -> None:
    latents, timestep, text = pico.inputs(1, 2, 6, 4)
    exact, rounded = (student.init_cache(1, 6, 4, dtype=dtype) for dtype in (None, torch.int8))
    for cache in (exact, rounded):
        student.forward_chunk(latents, timestep, text, cache, write=True)
    rows, found = (cache.take(cache.kept(2), cache.slots([0, 1])) for cache in (exact, rounded))
    assert torch.equal(found, dequantize(*quantize(rows)))
    assert rounded.bytes() < exact.bytes()


@pytest.mark.skipif(reason := mla_attention.why_not("cpu", torch.float32), reason=str(reason))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: v["position"])
@pytest.mark.parametrize("bits", ["auto", "int8", ((7, 8), (9, 4))], ids=str)
def test_kernels_equal_torch(layout: dict[str, Any], bits: Any) -> None:
    model = pico.convert(pico.dense_model(heads=3, layers=2), **layout)
    model.set_cache(bits)
    found = []
    for mode in ("torch", "triton"):
        model.set_kernels(mode, "chunk")
        cache = model.init_cache(1, 6, 4)
        latents, timestep, text = pico.inputs(1, 6, 6, 4)
        with torch.no_grad():
            for a, b in model.causal.chunks(6):
                found.append(model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, cache, write=True))
    half = len(found) // 2
    # Observed 4e-7; in fewer bits a value at a border may round the other way.
    tolerance = 5e-6 if bits == "auto" else 2e-3
    assert pico.relative_error(torch.cat(found[half:], dim=2), torch.cat(found[:half], dim=2)) < tolerance


@pytest.mark.skipif(reason := mla_attention.why_not("cpu", torch.float32), reason=str(reason))
@pytest.mark.parametrize("agrees", [True, False])
def test_a_kernel_that_is_compared_while_it_writes_leaves_the_latent_as_it_is(
    student: Any, monkeypatch: pytest.MonkeyPatch, agrees: bool
) -> None:
    """`auto` runs a layer twice in its first pass, and with a given start the first pass writes."""
    monkeypatch.setattr(kernels, "left_to_torch", lambda shape: None)
    if not agrees:
        whole = fused.attention
        monkeypatch.setattr(fused, "attention", lambda *arguments: 1.1 * whole(*arguments))
    model, rows = load_like(student), []
    for mode in ("torch", "auto"):
        model.set_kernels(mode)
        cache = model.init_cache(1, 6, 4)
        latents, timestep, text = pico.inputs(1, 2, 6, 4)
        with torch.no_grad():
            model.forward_chunk(latents, timestep, text, cache, write=True)
        rows.append(cache.take(cache.kept(2), cache.slots([0, 1])))
    # Observed 2.3e-6: the layers in front differ by rounding.
    assert pico.relative_error(rows[1], rows[0]) < 5e-6


def test_streams_of_a_batch_equal_single_rollouts(student: Any) -> None:
    batch = StreamBatch(student, lanes=2, height=6, width=4, num_inference_steps=2)
    texts = [pico.inputs(1, 1, 6, 4, seed=seed)[2][0] for seed in (1, 2)]
    numbers = [batch.join(text, seed=seed, num_frames=9) for seed, text in enumerate(texts)]
    parts: dict[int, list[Any]] = {number: [] for number in numbers}
    while batch.active:
        for chunk in batch.step():
            parts[chunk.stream].append(chunk.latents)
    for seed, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        alone = torch.cat(
            list(stream_chunks(student, text.unsqueeze(0), 9, 6, 4, num_inference_steps=2, seed=seed)), dim=2
        )
        assert pico.relative_error(torch.cat(parts[number], dim=1), alone[0]) < FLOAT32


def gradients(model: Any, clip: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.requires_grad_(True)
    model(*clip).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_reach_every_layer_and_may_be_computed_again(student: Any) -> None:
    model, clip = load_like(student), pico.inputs(2, 7, 6, 4)
    kept = gradients(model, clip)
    for layer in range(LAYERS):
        assert kept[f"blocks.{layer}.attn1.kv_a_proj.weight"].abs().max() > 0
    model.train()
    with checkpointed(model):
        again = gradients(model, clip)
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


def test_compiled_blocks_give_the_same(student: Any) -> None:
    model, clip = load_like(student), pico.inputs(1, 4, 6, 4)
    expected = model(*clip).sample
    for block in model.blocks[:SHARED]:
        block.compile(backend="eager")
    assert pico.relative_error(model(*clip).sample, expected) < FLOAT32


def test_what_two_layers_have_in_common_is_stored_once() -> None:
    """Two layers with the same keys and values together need the rank of one."""
    dense = pico.dense_model()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (400, 2, 12)
    place = torch.polar(torch.ones(400, 6), drawn(400, 6))
    hidden, activations = drawn(400, 24), [drawn(*shape) for _ in range(6)]
    sample = LayerSample(hidden, *activations[:2], place, *activations[2:], queried=hidden[:0])
    config = ConvertConfig(layers_per_latent=2, kv_lora_rank=8)
    axes = dense.rotary_table().axes
    readings = [read_layer(dense.blocks[i].attn1, sample, axes, config, torch.Generator()) for i in range(2)]
    (single,) = initialize_layers(readings[:1], config, 8)
    both = initialize_layers(readings, config, 8)
    # What is restored of a token: the latent is the sum of what both layers make of their keys and values, which are
    # the same here.
    encoder = sum(plan.tensors["kv_a_proj.weight"] for plan in both)
    restored = both[0].tensors["kv_b_proj.weight"] @ encoder
    expected = single.tensors["kv_b_proj.weight"] @ single.tensors["kv_a_proj.weight"]
    assert pico.relative_error(restored, expected) < 1e-4
    twice = both[0].tensors["kv_b_proj.weight"] - both[1].tensors["kv_b_proj.weight"]
    assert twice.abs().max() < 1e-4 * both[0].tensors["kv_b_proj.weight"].abs().max()


def test_a_budget_counts_what_is_cached() -> None:
    config = {"budget": {"scalars_per_token": 9, "rank_multiple": 2}, "layers_per_latent": SHARED}
    model = pico.convert(dense_model(), **config)
    assert model.mla.scalars_per_token() <= 9
    ranks = model.mla.kv_lora_rank
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3] and sum(ranks[::2]) == 2 * 9 * 2
    clip = pico.inputs(1, 9, 6, 4)
    assert pico.relative_error(pico.stream(model, *clip)[0], model(*clip).sample) < FLOAT32


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_lora_rank": [12, 20]},
        {"kv_lora_rank": 20, "init": "random", "q_lora_rank": 12},
        {"budget": {"scalars_per_token": 9, "rank_multiple": 2}},
    ],
    ids=["list", "random", "budget"],
)
def test_a_killed_conversion_ends_with_the_same_bytes(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files of a latent, so both layers are fitted again."""
    dense_model().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    source = load_source(str(tmp_path / "dense"))
    calibration = {"clips": 8, "batch_size": 4, "queries_per_chunk": 4}
    config = ConvertConfig(layers_per_latent=SHARED, calibration=calibration, **settings)

    def convert(work: str) -> Path:
        found = convert_source(source, config, tmp_path / work, pico.batches())
        save_checkpoint(found.model, tmp_path / f"{work}-out", {}, tensors=found.tensors)
        return tmp_path / f"{work}-out"

    whole = convert("whole")
    model = convert_model(FAMILY, load_dense(source), config, pico.batches())
    loaded = load_checkpoint(whole, verify=True)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    parts = importlib.import_module("mla_convert.convert.parts")
    put, written = parts.PartFiles.put, []

    def killed(self: Any, layer: int, *arguments: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        put(self, layer, *arguments)
        written.append(layer)

    monkeypatch.setattr(parts.PartFiles, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        convert("killed")
    monkeypatch.setattr(parts.PartFiles, "put", put)
    fitted: list[int] = []
    original = layers_module.read_layer
    monkeypatch.setattr(
        layers_module, "read_layer", lambda layer, *rest: (fitted.append(layer.layer), original(layer, *rest))[1]
    )
    assert digests(convert("killed")) == digests(whole)
    assert sorted(fitted) == sorted(set(range(LAYERS)) - set(written[:2]))


def test_fidelity_of_a_conversion_that_loses_nothing() -> None:
    dense = dense_model()
    model = pico.convert(dense, kv_lora_rank=96, layers_per_latent=SHARED)
    latents, _, text = pico.inputs(4, 8, 6, 4)
    result = fidelity(model, dense, {"latents": latents, "encoder_hidden_states": text}, batch_size=2, seed=0)
    assert max(result["attention_rel_error"]) < FLOAT32
    assert abs(result["loss_increase"]) < FLOAT32
    assert len(result["attention_maps"]) == LAYERS
    assert max(max(layer["total_variation"]) for layer in result["attention_maps"]) < FLOAT32


def test_fidelity_is_what_the_layers_do_with_what_all_of_them_make(student: Any) -> None:
    """The figure equals its definition: restore every layer's keys and values from the sum of the parts."""
    dense = dense_model()
    latents, _, text = pico.inputs(4, 8, 6, 4)
    clips = {"latents": latents, "encoder_hidden_states": text}
    reported = fidelity(student, dense, clips, batch_size=4, seed=0)["attention_rel_error"]
    stage = MatchAttention(MatchAttentionConfig(steps=1, learning_rate=1e-3, metric="output"))
    loss, _ = stage.loss({"student": student, "teacher": dense}, clips, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(sum(error**2 for error in reported) / LAYERS, rel=1e-5)


@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_match_attention_trains_the_parts_of_all_layers(metric: str) -> None:
    dense = dense_model()
    model = load_like(pico.convert(dense, init="random", **LAYOUTS[0]))
    latents, _, text = pico.inputs(4, 8, 6, 4)
    batch = {"latents": latents, "encoder_hidden_states": text}
    stage = MatchAttention(MatchAttentionConfig(steps=1, learning_rate=1e-3, metric=metric))
    latent = [p.requires_grad_() for name, p in model.named_parameters() if "kv_a_proj" in name or "kv_b_proj" in name]
    optimizer = torch.optim.Adam(latent, lr=1e-2)
    losses = []
    for _ in range(12):
        loss, _ = stage.loss({"student": model, "teacher": dense}, batch, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in latent)


def test_match_attention_on_the_students_activations_is_refused(student: Any) -> None:
    stage = MatchAttention(MatchAttentionConfig(steps=1, learning_rate=1e-3, hidden_states="student"))
    with pytest.raises(UsageError, match="set hidden_states to teacher"):
        stage.check(student, {}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"own_chunk": "latent"}, "needs own_chunk exact"),
        ({"position": "decoupled", "qk_rope_head_dim": 4}, "needs position rotate_on_read or derived"),
        ({"init": "svd"}, "set init to activation"),
        ({"calibration": {"metric": "output"}}, "set calibration.metric to velocity"),
    ],
    ids=["own-chunk", "position", "svd", "metric"],
)
def test_what_cannot_be_shared_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConvertConfig(layers_per_latent=2, **settings)


def test_numbers_that_do_not_fit_the_model() -> None:
    blocks = ModelBlocks(dense_model())
    with pytest.raises(UsageError, match="4 layers cannot share latents 3 at a time; one of 1, 2, 4"):
        ranks_of(blocks, ConvertConfig(layers_per_latent=3))
    with pytest.raises(UsageError, match="lists 4 latents, the model has 2"):
        ranks_of(blocks, ConvertConfig(layers_per_latent=2, kv_lora_rank=[8] * 4))
    with pytest.raises(UsageError, match=r"97 in layer 0 is not between 1 and 96, the width of \[k; v\] of 2 layers"):
        ranks_of(blocks, ConvertConfig(layers_per_latent=2, kv_lora_rank=97))
    assert ConvertConfig(layers_per_latent=2).kv_lora_rank == 384
    shape = {"v_head_dim": 12, "rope_pairs": [[]] * 4, "nope_pairs": [[0]] * 4, "own_chunk": "exact"}
    with pytest.raises(ValidationError, match="must have the same kv_lora_rank"):
        MLAConfig(position="rotate_on_read", kv_lora_rank=[8, 9, 8, 8], layers_per_latent=2, **shape)
    with pytest.raises(ValidationError, match="4 layers cannot share latents 3 at a time"):
        MLAConfig(position="rotate_on_read", kv_lora_rank=[8] * 4, layers_per_latent=3, **shape)
