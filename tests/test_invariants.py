"""The invariants of the design, on random tiny models: odd sizes, several heads, batches, wrapped windows."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from mla_convert.mla.attention import stream_pass
from mla_convert.mla.core import KeyValue, Query, Segment, attend
from mla_convert.mla.latent import AbsorbedWeights
from mla_convert.mla.window import CausalConfig

# Relative to the largest magnitude; the largest error seen on a CPU stands beside each.
FLOAT32 = 2e-6  # 3.0e-7
BFLOAT16 = 8e-3  # 0.0: both forms round alike; the tolerance is one unit in the last place

WINDOWS = [
    {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1},
    {"num_frames_per_block": 3, "window_frames": 6, "sink_frames": 0},
    {"num_frames_per_block": 1, "window_frames": 4, "sink_frames": 2},
    {"num_frames_per_block": 2, "window_frames": 7, "sink_frames": 2, "independent_first_frame": True},
    {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1, "sink_positions": "absolute"},
]
# Models whose window is that of `CausalConfig`.
FAMILIES = ["wan", "skyreels_v2"]


def stock_copy(dense: Any) -> WanTransformer3DModel:
    settings = {k: v for k, v in dense.config.items() if not k.startswith("_") and k != "causal"}
    stock = WanTransformer3DModel(**settings).eval()
    stock.load_state_dict(dense.state_dict())
    return stock


class MaskedProcessor:
    """Stock Wan self-attention under an explicit mask `[S, S]`, in plain torch."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any, mask: Any, rotary: Any) -> Tensor:
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        cos, sin = (table[..., 0::2] for table in rotary)

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

        logits = torch.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)) / q.shape[-1] ** 0.5
        weights = logits.masked_fill(~self.mask, -torch.inf).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def block_causal_mask(causal: CausalConfig, frames: int, tokens: int) -> Tensor:
    visible = torch.zeros(frames, frames, dtype=torch.bool)
    for start, stop in causal.chunks(frames):
        visible[start:stop, causal.history(start, stop)] = True
        visible[start:stop, start:stop] = True
    return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (2, 12), (3, 20)])
def test_one_chunk_equals_the_stock_forward(heads: int, head_dim: int) -> None:
    dense = pico.dense_model(heads, head_dim, causal={"num_frames_per_block": 5, "window_frames": 5})
    latents, _, text = pico.inputs(2, 5, 6, 10)
    timestep = torch.tensor([250.0, 800.0])
    stock = stock_copy(dense)(latents, timestep, text).sample
    assert pico.relative_error(dense(latents, timestep, text).sample, stock) < FLOAT32


@pytest.mark.parametrize("window", [w for w in WINDOWS if w["sink_frames"] == 0 or "sink_positions" in w], ids=str)
def test_streaming_equals_the_stock_forward_under_the_mask(window: dict[str, Any]) -> None:
    """Absolute positions throughout, as in the stock model with a mask."""
    dense = pico.dense_model(causal=window)
    latents, timestep, text = pico.inputs(2, 12, 6, 4)
    stock = stock_copy(dense)
    for block in stock.blocks:
        block.attn1.set_processor(MaskedProcessor(block_causal_mask(dense.causal, 12, 6)))
    expected = stock(latents, timestep.repeat_interleave(6, 1), text).sample
    streamed, cache = pico.stream(dense, latents, timestep, text)
    assert pico.relative_error(streamed, expected) < FLOAT32
    assert pico.relative_error(dense(latents, timestep, text).sample, expected) < FLOAT32
    assert cache.frames_seen == 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
@pytest.mark.parametrize("case", range(4), ids=["rotate_on_read", "derived", "decoupled", "baked"])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 12)])
def test_full_rank_loses_nothing(heads: int, head_dim: int, case: int, own_chunk: str, family: str) -> None:
    dense = pico.dense_model(heads, head_dim, family=family)
    model = pico.convert(dense, **pico.lossless(heads, head_dim, own_chunk)[case])
    clip = pico.inputs(2, 11, 6, 4)
    expected = dense(*clip).sample
    assert pico.relative_error(model(*clip).sample, expected) < FLOAT32
    assert pico.relative_error(pico.stream(model, *clip)[0], expected) < FLOAT32


def attend_absorbed(
    query: Tensor,
    nope_channels: int,
    latent: Tensor,
    shared_key: Tensor,
    weights: AbsorbedWeights,
    scale: float,
    mean_key: Tensor | None = None,
) -> Tensor:
    """Attention `[B, Q, H, V]` over latents without expanding them.

    `query` `[B, Q, H, N + R]` is ready for the dot product, `latent` is `[B, K, r]` and `shared_key`
    `[B, K, R]` is rotated; with `mean_key` `[K, H, M]`, the rotated constant key, queries have M more
    channels. The weights that restore keys are absorbed into the queries, those that restore
    values are applied after the softmax (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """
    nope, rope, mean = query.tensor_split([nope_channels, nope_channels + shared_key.shape[-1]], dim=-1)
    absorbed = torch.einsum("bqhn,hnr->bqhr", nope, weights.w_uk)
    logits = torch.einsum("bqhr,bkr->bhqk", absorbed, latent) + torch.einsum("bqhp,bkp->bhqk", rope, shared_key)
    logits = logits + torch.einsum("bqhn,hn->bhq", nope, weights.b_uk).unsqueeze(-1)
    if mean_key is not None:
        logits = logits + torch.einsum("bqhm,khm->bhqk", mean, mean_key)
    mixed = torch.einsum("bhqk,bkr->bqhr", (scale * logits).softmax(-1), latent)
    return torch.einsum("bqhr,hvr->bqhv", mixed, weights.w_uv) + weights.b_uv


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", pico.VARIANTS, ids=lambda v: f"{v['position']}-{v['own_chunk']}")
def test_absorbed_expanded_and_reference_agree(variant: dict[str, Any], family: str) -> None:
    model = pico.convert(pico.dense_model(heads=3, family=family), **variant)
    layer = model.blocks[0].attn1
    if variant["position"] == "rotate_on_read":
        with pytest.raises(ValueError, match="cannot be absorbed"):
            layer.absorbed()
        return
    cache = model.init_cache(2, 6, 4)
    step = stream_pass(model.rotary_table, cache, 2, write=False)
    hidden = torch.randn(2, 12, 36)
    query, key, value = layer.project(hidden)
    addressed = layer.history_query(Query(None, layer.split_heads(query)), step).rotated(step.views[0].own_rotations)
    rows = layer.encode(key, value, step)
    expanded = layer.expand(rows)
    keys = expanded.keys(step.views[0].own_rotations)
    fused = attend([Segment(addressed, keys, expanded.value)], layer.scale)
    logits = torch.einsum("bqhd,bkhd->bhqk", addressed.double(), keys.double()) * layer.scale
    reference = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), expanded.value.double())
    nope, rope = 2 * len(layer.nope_pairs), 2 * len(layer.rope_pairs)
    latent, shared, mean = rows[..., : layer.rank], keys[:, :, 0, nope : nope + rope], keys[0, :, :, nope + rope :]
    absorbed = attend_absorbed(addressed, nope, latent, shared, layer.absorbed(), layer.scale, mean)
    assert pico.relative_error(fused.double(), reference) < FLOAT32
    assert pico.relative_error(absorbed.double(), reference) < FLOAT32


@pytest.mark.parametrize(
    ("family", "window"),
    [("wan", window) for window in WINDOWS] + [(name, WINDOWS[3]) for name in FAMILIES[1:]],
    ids=str,
)
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_streaming_equals_the_whole_clip(variant: dict[str, Any] | None, family: str, window: dict[str, Any]) -> None:
    dense = pico.dense_model(causal=window, family=family)
    model = dense if variant is None else pico.convert(dense, **variant)
    # 23 frames wrap every one of these windows several times and end in a short chunk.
    clip = pico.inputs(3, 23, 2, 6)
    streamed, cache = pico.stream(model, *clip)
    assert pico.relative_error(streamed, model(*clip).sample) < FLOAT32
    assert cache.frames_seen == 23


@pytest.mark.parametrize("variant", [pico.VARIANTS[0], pico.VARIANTS[6]], ids=["decoupled", "rotate_on_read"])
def test_streaming_equals_the_whole_clip_in_bfloat16(variant: dict[str, Any]) -> None:
    model = pico.convert(pico.dense_model(), **variant).to(torch.bfloat16)
    latents, timestep, text = pico.inputs(2, 12, 6, 4)
    clip = (latents.bfloat16(), timestep, text.bfloat16())
    assert pico.relative_error(pico.stream(model, *clip)[0].float(), model(*clip).sample.float()) < BFLOAT16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_teacher_forcing_equals_chunk_by_chunk(variant: dict[str, Any] | None, family: str) -> None:
    """The packed forward with a clean context equals a rollout whose cache holds the clean chunks."""
    dense = pico.dense_model(family=family)
    model = dense if variant is None else pico.convert(dense, **variant)
    clean, _, text = pico.inputs(2, 9, 6, 4)
    noisy, timestep, _ = pico.inputs(4, 9, 6, 4, seed=3)
    packed = model(noisy, timestep, text.repeat(2, 1, 1), context=clean).sample
    cache = model.init_cache(2, 6, 4)
    chunks = []
    for a, b in model.causal.chunks(9):
        halves = [model.forward_chunk(noisy[i : i + 2, :, a:b], timestep[i : i + 2, a:b], text, cache) for i in (0, 2)]
        chunks.append(torch.cat(halves))
        model.forward_chunk(clean[:, :, a:b], torch.zeros(2), text, cache, write=True)
    assert pico.relative_error(torch.cat(chunks, dim=2), packed) < FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_shifting_every_temporal_index_changes_nothing(
    variant: dict[str, Any] | None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = pico.dense_model(family=family)
    model = dense if variant is None else pico.convert(dense, **variant)
    clip = pico.inputs(2, 9, 6, 4)
    here, _ = pico.stream(model, *clip)
    plain = CausalConfig.temporal_index
    monkeypatch.setattr(CausalConfig, "temporal_index", lambda self, f, stop: [i + 37 for i in plain(self, f, stop)])
    there, _ = pico.stream(model, *clip)
    assert pico.relative_error(there, here) < FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position", ["rotate_on_read", "derived", "decoupled", "baked"])
def test_the_error_falls_with_the_rank(position: str, family: str) -> None:
    dense = pico.dense_model(family=family)
    clip = pico.inputs(4, 8, 6, 4, seed=10)
    expected = dense(*clip).sample
    shared = {} if position == "rotate_on_read" else {"qk_rope_head_dim": 6}
    errors = []
    for rank in (2, 8, 18, 36):
        model = pico.convert(dense, position=position, kv_lora_rank=rank, own_chunk="exact", **shared)
        errors.append(float((model(*clip).sample - expected).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_the_cache_holds_exactly_the_advertised_scalars(variant: dict[str, Any] | None, family: str) -> None:
    dense = pico.dense_model(heads=3, family=family)
    model = dense if variant is None else pico.convert(dense, **variant)
    advertised = 2 * 3 * 12 if variant is None else 20
    latents, timestep, text = pico.inputs(2, 12, 6, 4)
    _, cache = pico.stream(model, latents, timestep, text)
    assert cache.scalars_per_token() == advertised
    assert cache.bytes() == 2 * 2 * 5 * 6 * advertised * 4
    held = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    assert held == []


def test_a_long_rollout_stays_in_the_table_and_in_its_memory() -> None:
    """Ten times the window: the buffers stay the same, and no rotary index exceeds the window."""
    dense = pico.dense_model()
    table = dense.rotary_table()
    seen: list[int] = []

    class Watched(type(table)):  # type: ignore[misc]
        def rotations(self, frames: list[int], height: int, width: int) -> Tensor:
            seen.extend(frames)
            return super().rotations(frames, height, width)

    watched = Watched(table.cis, table.axes)
    dense.rotary_table = lambda: watched
    latents, timestep, text = pico.inputs(1, 50, 2, 2)
    cache = dense.init_cache(1, 2, 2)
    buffers = [rows.data_ptr() for rows in cache.rows]
    for start, stop in dense.causal.chunks(50):
        dense.forward_chunk(latents[:, :, start:stop], timestep[:, start:stop], text, cache, write=True)
    assert max(seen) < dense.causal.window_frames
    assert [rows.data_ptr() for rows in cache.rows] == buffers


def test_an_absolute_index_beyond_the_table_is_refused() -> None:
    dense = pico.dense_model(causal={**WINDOWS[4]})
    cache = dense.init_cache(1, 2, 2)
    cache.frames_seen = 1024
    with pytest.raises(IndexError, match="outside the table of 1024"):
        dense.forward_chunk(*pico.inputs(1, 2, 2, 2), cache)


@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
def test_nothing_is_encoded_twice_or_rotated_and_then_dropped(own_chunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"position": "rotate_on_read", "kv_lora_rank": 20, "own_chunk": own_chunk}
    model = pico.convert(pico.dense_model(layers=1), **settings)
    layer, encoded, batches = model.blocks[0].attn1, [], []
    encode, keys = layer.encode, KeyValue.keys

    def noted_encode(key: Any, value: Any, step: Any) -> Any:
        encoded.append(len(key))
        return encode(key, value, step)

    def noted_keys(self: Any, rotations: Any) -> Any:
        batches.append(len(self.value))
        return keys(self, rotations)

    monkeypatch.setattr(layer, "encode", noted_encode)
    monkeypatch.setattr(KeyValue, "keys", noted_keys)
    latents, timestep, text = pico.inputs(2, 4, 6, 4)
    with torch.no_grad():
        model(latents, timestep, text, context=latents[:1])
        # The keys of either chunk, of the context and of two clips, and the history of the second, of the context.
        assert batches == [3, 3, 1] and encoded == [1 if own_chunk == "exact" else 3]
        cache = model.init_cache(2, 6, 4)
        model.forward_chunk(latents[:, :, :2], timestep[:, :2], text, cache, write=True)
    assert encoded[1:] == [2]
