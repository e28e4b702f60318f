"""Streams that join and leave at different times and share passes equal their rollouts alone."""

from __future__ import annotations

from typing import Any

import mla_attention
import pico
import pytest
import torch
from stream_case import FLOAT32, HEIGHT, VARIANTS, WIDTH, alone, batch_of, prompt
from torch import Tensor

from mla_convert.errors import UsageError, UserError
from mla_convert.evaluate.geometry import from_model
from mla_convert.evaluate.memory import plan
from mla_convert.evaluate.rollouts import heldout_prompts
from mla_convert.load import load_dense, load_source
from mla_convert.mla import fused, kernels
from mla_convert.mla.cache import LatentCache, StoredRows
from mla_convert.mla.kernels import Kernels
from mla_convert.mla.pool import CachePool, LaneView
from mla_convert.mla.quantized import Int8LatentCache
from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.data import FRAME, GUIDANCE, SHIFT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSAL = mla_attention.why_not(DEVICE, torch.float32)
needs_kernels = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
WINDOWS = [
    pico.WINDOW,
    {"num_frames_per_block": 3, "window_frames": 7, "sink_frames": 0, "independent_first_frame": True},
    {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1, "sink_positions": "absolute"},
]


def poison(batch: StreamBatch) -> None:
    """Write NaN to every lane that no stream has."""
    for cache in batch.pool.caches:
        for kept in getattr(cache, "scales", cache.rows):
            kept[batch.pool.free] = torch.nan


def collect(made: dict[int, list[Tensor]], batch: StreamBatch, rounds: int | None = None) -> None:
    """Run some rounds, or all that are left; free lanes hold NaN throughout."""
    while batch.active and rounds != 0:
        poison(batch)
        for chunk in batch.step():
            assert chunk.first == sum(x.shape[1] for x in made.setdefault(chunk.stream, []))
            made[chunk.stream].append(chunk.latents)
        rounds = None if rounds is None else rounds - 1


def check(made: dict[int, list[Tensor]], expected: dict[int, Tensor], bitwise: bool = False) -> None:
    assert made.keys() == expected.keys()
    for number, latents in expected.items():
        actual = torch.cat(made[number], dim=1)
        assert actual.shape == latents.shape
        assert torch.equal(actual, latents) if bitwise else pico.relative_error(actual, latents) < FLOAT32


def eventful(model: Any, bitwise: bool = False, **settings: Any) -> None:
    """Five streams in five lanes: joins at four times, guidance, one that leaves, a short last chunk, reused lanes."""
    batch, made = batch_of(model, 5, **settings), {}
    first = batch.join(prompt(0), seed=10)
    second = batch.join(prompt(1), seed=11, num_frames=9, guidance_scale=3.0)
    collect(made, batch, 2)
    third = batch.join(prompt(2), seed=12, num_frames=8)
    collect(made, batch, 1)
    batch.leave(first)
    seen = sum(x.shape[1] for x in made[first])
    fourth = batch.join(prompt(3), seed=13, num_frames=14, guidance_scale=2.0, negative_hidden_states=prompt(9))
    collect(made, batch, 3)
    fifth = batch.join(prompt(4), seed=14, num_frames=7)
    collect(made, batch)
    single = {key: value for key, value in settings.items() if key != "lanes_per_pass"}
    check(
        made,
        {
            first: alone(model, prompt(0), seen, 10, **single),
            second: alone(model, prompt(1), 9, 11, guidance_scale=3.0, **single),
            third: alone(model, prompt(2), 8, 12, **single),
            fourth: alone(
                model, prompt(3), 14, 13, guidance_scale=2.0, negative_hidden_states=prompt(9).unsqueeze(0), **single
            ),
            fifth: alone(model, prompt(4), 7, 14, **single),
        },
        bitwise,
    )
    assert sorted(batch.pool.free) == list(range(5))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v and f"{v['position']}-{v['own_chunk']}")
def test_streams_of_any_age_are_what_they_are_alone(variant: dict[str, Any] | None) -> None:
    dense = pico.dense_model()
    eventful(dense if variant is None else pico.convert(dense, **variant))


def test_a_stream_with_passes_of_its_own_is_the_single_run_to_the_bit() -> None:
    """So neither the pool nor a stream's age causes a difference; only the summation order in a batch does."""
    eventful(pico.dense_model(), bitwise=True, lanes_per_pass=1)
    eventful(pico.convert(pico.dense_model(), **pico.VARIANTS[0]), bitwise=True, lanes_per_pass=1)


@pytest.mark.parametrize("window", WINDOWS[1:], ids=["independent-first", "absolute"])
def test_other_windows(window: dict[str, Any]) -> None:
    eventful(pico.convert(pico.dense_model(causal=window), position="decoupled", kv_lora_rank=14, qk_rope_head_dim=6))


def test_another_family_and_sampler_noisy_context_and_small_passes() -> None:
    settings = {"context_noise": 0.1, "sampler": "renoise", "denoising_steps": (1000, 600, 300)}
    eventful(pico.dense_model(family="skyreels_v2"), lanes_per_pass=2, **settings)


def test_int8_and_experts() -> None:
    """Two experts, each with a quantized cache; a difference in the last bit may round to another integer."""
    experts = [
        pico.convert(pico.dense_model(seed=seed), position="derived", kv_lora_rank=20, qk_rope_head_dim=8)
        for seed in (0, 1)
    ]
    experts[0].noise_range, experts[1].noise_range = (0.7, 1.0), (0.0, 0.7)
    batch, made = batch_of(experts, 2), {}
    numbers = [batch.join(prompt(0), seed=1, num_frames=9)]
    collect(made, batch, 1)
    numbers.append(batch.join(prompt(1), seed=2, num_frames=5))
    collect(made, batch)
    check(made, {numbers[0]: alone(experts, prompt(0), 9, 1), numbers[1]: alone(experts, prompt(1), 5, 2)})
    batch = batch_of(experts, 2, cache_dtype=torch.int8)
    assert batch.bytes() == 2 * 2 * 2 * 5 * 6 * (20 + 2)
    batch.join(prompt(0), seed=1, num_frames=9)
    batch.step()
    batch.join(prompt(1), seed=2)
    chunks = [chunk for _ in range(4) for chunk in batch.step()]
    assert all(chunk.latents.isfinite().all() for chunk in chunks)


KERNEL_CASES = [
    (None, "expand", "chunk", None),
    (pico.VARIANTS[0], "absorbed", "pass", None),
    (pico.VARIANTS[1], "absorbed", "pass", None),
    (pico.VARIANTS[1], "expand", "pass", None),
    (pico.VARIANTS[6], "expand", "chunk", None),
    (pico.VARIANTS[0], "absorbed", "pass", torch.int8),
    (pico.VARIANTS[6], "expand", "pass", torch.int8),
    (pico.VARIANTS[6] | {"layers_per_latent": 2}, "expand", "pass", None),
    (pico.VARIANTS[0], "absorbed", "pass", ((3, 8), (9, 4))),
    (pico.VARIANTS[6], "expand", "chunk", ((3, 8), (9, 4))),
    (pico.VARIANTS[6] | {"layers_per_latent": 2}, "expand", "pass", ((3, 8), (9, 4))),
]


def of_two_ages(model: Any, mode: str, history: str, cache: Any) -> tuple[list[Tensor], Kernels]:
    """Two streams that share the passes of the younger one's last chunk; the younger one has the lower lane."""
    chosen = model.set_kernels(mode, history)
    if isinstance(cache, tuple):
        model.set_cache(cache)
    dtype = cache if cache == torch.int8 else None
    batch, made = batch_of(model, 3, num_inference_steps=steps_for(history), cache_dtype=dtype), {}
    gone = batch.join(prompt(9))
    old = batch.join(prompt(0), seed=1, num_frames=4)
    batch.leave(gone)
    collect(made, batch, 1)
    young = batch.join(prompt(1), seed=2, num_frames=3)
    collect(made, batch)
    return [torch.cat(made[number], dim=1) for number in (old, young)], chosen


def steps_for(history: str) -> int:
    """The number of steps; a kept history is reused from the second pass on."""
    return 2 if history == "chunk" else 1


@needs_kernels
@pytest.mark.parametrize(
    ("variant", "path", "history", "cache"),
    KERNEL_CASES,
    ids=lambda v: "-".join(str(x) for x in v.values()) if isinstance(v, dict) else str(v),
)
def test_streams_of_any_age_by_kernels(
    variant: dict[str, Any] | None, path: str, history: str, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a table of slots for each lane; in the interpreter if there is no GPU."""
    monkeypatch.setattr(fused, "PATHS", (path,))
    causal = {"num_frames_per_block": 1, "window_frames": 3, "sink_frames": 1}
    dense = pico.dense_model(heads=1, layers=(variant or {}).get("layers_per_latent", 1), causal=causal)
    model = (dense if variant is None else pico.convert(dense, **variant, key_mean=path == "expand")).to(DEVICE)
    expected, _ = of_two_ages(model, "torch", history, cache)
    actual, chosen = of_two_ages(model, "triton", history, cache)
    shared = max((shape for _, shape in chosen.found.choices), key=lambda shape: shape.batch)
    assert shared.batch == 2 and "LaneView" in shared.cache
    assert {taken.partition(",")[0] for taken in chosen.report()["paths"]} == {path}
    model.set_kernels("torch")
    for index, (latents, by_torch) in enumerate(zip(actual, expected, strict=True)):
        # Observed 2.4e-7; of fewer bits as well, where a value that rounds to the next step would weigh more.
        assert pico.relative_error(latents, by_torch) < (FLOAT32 if cache is None else 1e-3)
        if cache is None:
            single = alone(model, prompt(index), 4 - index, 1 + index, num_inference_steps=steps_for(history))
            assert pico.relative_error(latents, single) < FLOAT32  # 2.4e-7


@needs_kernels
def test_auto_compares_views_with_torch_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout of the same shape does not verify how a pool is addressed."""
    monkeypatch.setattr(kernels, "left_to_torch", lambda shape: None)
    model = pico.dense_model(layers=1).to(DEVICE)
    chosen = model.set_kernels("auto")
    alone(model, prompt(0), 2, num_inference_steps=1)
    batch = batch_of(model, 2, num_inference_steps=1)
    batch.join(prompt(0), num_frames=2)
    collect({}, batch)
    assert {shape.cache.partition(",")[0] for _, shape, *_ in chosen.found.checked} == {
        "DenseCache",
        "LaneView",
    }
    assert chosen.report()["paths"] == {"expand, sdpa": 1} and chosen.found.announced


class HalfCache(LatentCache):
    """A family's own ring of latents, which stores them halved."""

    why_no_kernels = "its latents are halved"

    def take(self, kept: StoredRows, slots: Tensor) -> Tensor:
        return 2 * super().take(kept, slots)

    def put(self, kept: StoredRows, slots: Tensor, rows: Tensor) -> None:
        super().put(kept, slots, rows / 2)


def test_a_familys_own_ring_is_a_ring_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams share it through its own reads and writes, and it can have fewer bits; kernels leave it to torch."""
    monkeypatch.setattr(kernels, "left_to_torch", lambda shape: None)
    model = pico.convert(pico.dense_model(), **pico.VARIANTS[0])
    expected = alone(model, prompt(0), 9, 1)
    model.cache_class = HalfCache
    report = model.set_kernels("auto").report
    batch, made = batch_of(model, 2), {}
    batch.join(prompt(0), seed=1, num_frames=9)
    collect(made, batch)
    # Halves and doubles are exact.
    check(made, {0: expected}, bitwise=True)
    if REFUSAL is None:
        assert report()["refused"] == {path: ["its latents are halved"] for path in fused.PATHS}
    model.set_cache("int8")
    assert type(model.init_cache(1, HEIGHT, WIDTH)) is Int8LatentCache


def test_in_the_steady_state_all_streams_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 4)
    passes: list[tuple[int, bool]] = []
    forward = model.forward_chunk

    def counted(x: Tensor, *args: Any, write: bool, **kwargs: Any) -> Tensor:
        passes.append((len(x), write))
        out: Tensor = forward(x, *args, write=write, **kwargs)
        return out

    monkeypatch.setattr(model, "forward_chunk", counted)
    ages = []
    for seed in range(3):
        batch.join(prompt(seed), seed=seed, guidance_scale=2.0 if seed == 0 else 1.0)
        batch.step()
        ages.append(len(passes))
    # Windows that have 0, 2 and 3 frames of history: each has its own passes.
    assert ages == [3, 9, 18]
    batch.step()
    passes.clear()
    batch.step()
    assert len({stream.frames_seen for stream in batch._streams.values()}) == 3
    assert passes == [(4, False), (4, False), (4, True)]


def test_a_prompt_changes_what_comes_after_it_and_no_other_stream() -> None:
    model = pico.convert(pico.dense_model(), position="rotate_on_read", kv_lora_rank=20)
    batch, made = batch_of(model, 4), {}
    other = batch.join(prompt(1), seed=2, num_frames=10)
    collect(made, batch, 1)
    changed = batch.join(prompt(0), seed=1, num_frames=10, guidance_scale=2.0)
    collect(made, batch, 3)
    # Another number of tokens: from now on it has passes of its own.
    later = prompt(2, tokens=4)
    batch.change_prompt(changed, later)
    collect(made, batch)
    guided = {"guidance_scale": 2.0}
    unchanged = alone(model, prompt(0), 10, 1, **guided)
    expected = alone(
        model, prompt(0), 10, 1, prompt_at=lambda first: later.unsqueeze(0) if first == 6 else None, **guided
    )
    check(made, {changed: expected, other: alone(model, prompt(1), 10, 2)})
    assert torch.equal(expected[:, :6], unchanged[:, :6])
    assert pico.relative_error(expected[:, 6:], unchanged[:, 6:]) > 1e-2


def test_a_prompt_is_moved_when_it_joins_and_zeros_take_no_memory() -> None:
    """Experts on the same device and in the same dtype share one copy."""
    models = [pico.dense_model(seed=seed).to(torch.bfloat16) for seed in (0, 1)]
    models[0].noise_range, models[1].noise_range = (0.5, 1.0), (0.0, 0.5)
    batch, text = batch_of(models, 2), prompt(0)
    number = batch.join(text, guidance_scale=2.0)
    stream = batch._streams[number]
    assert stream.text[0] is stream.text[1] and torch.equal(stream.text[0], text.to(torch.bfloat16))
    assert stream.negative[0].shape == text.shape and stream.negative[0].untyped_storage().nbytes() == 2
    batch.change_prompt(number, prompt(1, tokens=4))
    assert batch.step()[0].stream == number
    assert stream.negative[1].shape == stream.text[1].shape == (4, 8)


def test_a_start_is_continued() -> None:
    model = pico.dense_model()
    start = pico.inputs(1, 4, HEIGHT, WIDTH)[0][0]
    batch, made = batch_of(model, 2), {}
    begun = batch.join(prompt(0), seed=3, num_frames=8, start=start)
    other = batch.join(prompt(1), seed=4, num_frames=8)
    collect(made, batch)
    assert torch.equal(torch.cat(made[begun], dim=1)[:, :4], start)
    check(made, {begun: alone(model, prompt(0), 8, 3, start=start.unsqueeze(0)), other: alone(model, prompt(1), 8, 4)})
    with pytest.raises(UsageError, match="a start of 3 frames does not end with a chunk"):
        batch.join(prompt(0), start=start[:, :3])


def test_starts_held_inside_a_chunk_beside_streams_without() -> None:
    """A partly given chunk has its own passes, because its frames have different noise levels."""
    model = pico.convert(pico.dense_model(), **pico.VARIANTS[0])
    start = pico.inputs(1, 3, HEIGHT, WIDTH)[0][0]
    settings = {"sampler": "renoise", "denoising_steps": (1000, 500)}
    batch, made = batch_of(model, 4, **settings), {}
    held = batch.join(prompt(0), seed=3, num_frames=8, start=start, hold_start=True, guidance_scale=2.0)
    whole = batch.join(prompt(1), seed=4, num_frames=8, start=start[:, :2])
    free = batch.join(prompt(2), seed=5, num_frames=8)
    collect(made, batch)
    assert torch.equal(torch.cat(made[held], dim=1)[:, :3], start)
    begun = {"start": start.unsqueeze(0), "hold_start": True, "guidance_scale": 2.0, **settings}
    expected = {
        held: alone(model, prompt(0), 8, 3, **begun),
        whole: alone(model, prompt(1), 8, 4, start=start[:, :2].unsqueeze(0), **settings),
        free: alone(model, prompt(2), 8, 5, **settings),
    }
    check(made, expected)


def test_the_first_chunk_of_every_stream_may_take_other_steps() -> None:
    model = pico.dense_model()
    settings = {"sampler": "renoise", "denoising_steps": (1000, 500), "first_chunk_steps": (1000, 800, 600, 300)}
    batch, made = batch_of(model, 2, **settings), {}
    old = batch.join(prompt(0), seed=1, num_frames=8)
    collect(made, batch, 1)
    young = batch.join(prompt(1), seed=2, num_frames=6)
    collect(made, batch)
    check(made, {old: alone(model, prompt(0), 8, 1, **settings), young: alone(model, prompt(1), 6, 2, **settings)})


def test_a_full_pool_refuses_or_lets_wait_in_turn() -> None:
    model = pico.dense_model()
    batch = batch_of(model, 2)
    first = batch.join(prompt(0))
    with pytest.raises(UserError, match="the stream needs 2 of its 2 lanes, but 1 are free; set when_full='queue' to"):
        batch.join(prompt(1), guidance_scale=2.0)
    assert batch.active == [first] and batch.waiting == []

    batch, made = batch_of(model, 2, when_full="queue"), {}
    first = batch.join(prompt(0), seed=0, num_frames=4)
    guided = batch.join(prompt(1), seed=1, num_frames=4, guidance_scale=2.0)
    # It would fit, but would keep the one before it waiting.
    last = batch.join(prompt(2), seed=2, num_frames=2)
    gone = batch.join(prompt(3))
    assert batch.active == [first] and batch.waiting == [guided, last, gone]
    batch.leave(gone)
    collect(made, batch, 2)
    assert batch.active == [guided] and batch.waiting == [last]
    collect(made, batch)
    check(
        made,
        {
            first: alone(model, prompt(0), 4, 0),
            guided: alone(model, prompt(1), 4, 1, guidance_scale=2.0),
            last: alone(model, prompt(2), 2, 2),
        },
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"encoder_hidden_states": torch.zeros(1, 3, 8)},
            r"a stream must have shape \[L, 8\], got \[1, 3, 8\]",
        ),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"negative_hidden_states": torch.zeros(2, 8)}, "the negative prompt has 2 tokens, the prompt 3"),
        ({"guidance_scale": 2.0}, "a stream with guidance needs 2 lanes, the pool has 1"),
    ],
    ids=["prompt", "frames", "negative", "lanes"],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    batch = batch_of(pico.dense_model(layers=1), 1, when_full="queue")
    with pytest.raises(UsageError, match=message):
        batch.join(**{"encoder_hidden_states": prompt(0), **settings})
    assert batch.waiting == [] and batch.pool.free == [0]


def test_unknown_streams_and_empty_pools() -> None:
    model = pico.dense_model(layers=1)
    batch = batch_of(model, 1)
    assert batch.step() == []
    number = batch.join(prompt(0), num_frames=2)
    assert [chunk.last for chunk in batch.chunks()] == [True]
    with pytest.raises(UsageError, match=f"there is no stream {number} in the batch"):
        batch.leave(number)
    with pytest.raises(UsageError, match="lanes and lanes_per_pass must be at least 1"):
        batch_of(model, 0)
    with pytest.raises(UsageError, match="when_full must be 'refuse' or 'queue', got 'wait'"):
        batch_of(model, 1, when_full="wait")


def test_a_far_history_is_refused() -> None:
    with pytest.raises(UserError, match="cannot share a FarCache"):
        batch_of(pico.dense_model(family="anyflow_far", causal=None), 2)


@pytest.mark.parametrize("position", [None, "decoupled", "rotate_on_read"])
def test_bytes_are_those_of_the_plan(position: str | None) -> None:
    model = pico.dense_model(heads=3)
    if position is not None:
        model = pico.convert(
            model, position=position, kv_lora_rank=14, qk_rope_head_dim=6 if position == "decoupled" else 0
        )
    batch = batch_of(model, 64)
    geometry, rows = from_model(model, HEIGHT, WIDTH)
    planned = plan(geometry, rows, dtype="float32")
    assert batch.bytes() == 64 * planned.latent_cache_bytes
    if position is None:
        assert batch.bytes() == 64 * planned.dense_cache_bytes


def test_a_view_names_frames_by_their_place_in_the_window() -> None:
    model = pico.dense_model()
    cache = model.init_cache(3, HEIGHT, WIDTH)
    view = CachePool([cache]).view(0, [2, 0], [10, 4], 2)
    assert view.frames_seen == 3
    # A sink, then two frames that lie behind it in a ring of four.
    assert view.slots([0, 1, 2]).tolist() == [[10, 10 + 4, 10 + 1], [0, 2, 3]]
    with pytest.raises(ValueError, match="cannot share a pass"):
        LaneView(cache, [0, 1], [2, 4], 2)


def test_digits_streams_are_what_they_are_alone() -> None:
    """Six streams of the embedded teacher in eight lanes, joining at three times; docs/benchmarks has 64."""
    model = load_dense(load_source("zoo:digits"))
    text, _ = heldout_prompts(6)
    settings = {"num_inference_steps": 2, "shift": SHIFT}
    batch = StreamBatch(model, 8, FRAME, FRAME, when_full="queue", **settings)
    made: dict[int, list[Tensor]] = {}
    for index in range(6):
        scale = GUIDANCE if index % 3 == 0 else 1.0
        batch.join(text[index], seed=index, num_frames=10 - index, guidance_scale=scale)
        if index % 2:
            collect(made, batch, 1)
    collect(made, batch)
    for index in range(6):
        chunks = stream_chunks(
            model, text[index : index + 1], 10 - index, FRAME, FRAME, seed=index,
            guidance_scale=GUIDANCE if index % 3 == 0 else 1.0, **settings,
        )  # fmt: skip
        expected = torch.cat(list(chunks), dim=2)[0]
        assert pico.relative_error(torch.cat(made[index], dim=1), expected) < FLOAT32
