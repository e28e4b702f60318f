"""Streaming attention by kernels, in Triton's interpreter where there is no GPU, against plain torch."""

from __future__ import annotations

from typing import Any

import mla_attention
import pico
import pytest
import torch

from mla_convert.errors import UserError
from mla_convert.mla import fused, kernels
from mla_convert.mla.kernels import Choice, Kernels, Shape, operations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Observed 4e-7 in float32 on the CPU: sums in another order.
FLOAT32 = 5e-6
FRAMES, HEIGHT, WIDTH = 8, 6, 4
REFUSAL = mla_attention.why_not(DEVICE, torch.float32)
needs_kernels = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


def pair(variant: dict[str, Any] | None, **settings: Any) -> Any:
    """A dense tiny model, or a conversion of it, on the device of the kernels."""
    dense = pico.dense_model(heads=3)
    model = dense if variant is None else pico.convert(dense, **variant, **settings)
    return model.to(DEVICE)


def rollout(model: Any, mode: str, keep_history: bool = False, passes: int = 2) -> tuple[torch.Tensor, Any, Kernels]:
    """Velocities of a rollout whose chunks take several passes and are then written; its cache and choices."""
    latents, timestep, text = (x.to(DEVICE) for x in pico.inputs(2, FRAMES, HEIGHT, WIDTH))
    chosen = model.set_kernels(mode, keep_history)
    cache, found = model.init_cache(2, HEIGHT, WIDTH), []
    with torch.no_grad():
        for start, stop in model.causal.chunks(FRAMES):
            chunk = latents[:, :, start:stop]
            for index in range(passes):
                found.append(model.forward_chunk(chunk + index, timestep[:, start:stop], text, cache))
            model.forward_chunk(chunk, timestep[:, start:stop], text, cache, write=True)
    return torch.cat(found, dim=2), cache, chosen


CASES = [(None, True)] + [(variant, mean) for variant in pico.VARIANTS for mean in (True, False)]


@needs_kernels
@pytest.mark.parametrize("keep_history", [False, True], ids=["pass", "chunk"])
@pytest.mark.parametrize(
    ("variant", "mean"), CASES, ids=lambda v: v if not isinstance(v, dict) else f"{v['position']}-{v['own_chunk']}"
)
def test_kernels_equal_torch(variant: dict[str, Any] | None, mean: bool, keep_history: bool) -> None:
    model = pair(variant, key_mean=mean)
    expected, rows, _ = rollout(model, "torch")
    actual, kernel_rows, chosen = rollout(model, "triton", keep_history)
    assert pico.relative_error(actual, expected) < FLOAT32
    for ours, theirs in zip(kernel_rows.rows, rows.rows, strict=True):
        assert pico.relative_error(ours, theirs) < FLOAT32
    paths = chosen.report()["paths"]
    assert "torch" not in paths and sum(paths.values()) == len(model.blocks)


@needs_kernels
def test_a_cached_shared_key_without_a_mean_is_absorbed_and_all_else_expanded() -> None:
    for variant, mean in CASES:
        model = pair(variant, key_mean=mean)
        paths = rollout(model, "auto")[2].report()["paths"]
        absorbed = variant is not None and variant["position"] in ("decoupled", "baked") and not mean
        assert paths == {"absorbed" if absorbed else "expand": 2}


@needs_kernels
def test_auto_leaves_a_kernel_that_disagrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(pico.VARIANTS[0])
    expected, _, _ = rollout(model, "torch")
    whole = fused.attention
    monkeypatch.setattr(fused, "attention", lambda *arguments: 1.1 * whole(*arguments))
    actual, _, chosen = rollout(model, "auto")
    report = chosen.report()
    assert report["paths"] == {"torch": 2} and "differs from torch by" in str(report["refused"])
    assert torch.equal(actual, expected)


@needs_kernels
def test_auto_leaves_a_kernel_that_fails_and_triton_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of registers")

    model = pair(pico.VARIANTS[0])
    expected, _, _ = rollout(model, "torch")
    monkeypatch.setattr(fused, "attention", broken)
    with pytest.raises(RuntimeError, match="out of registers"):
        rollout(model, "triton")
    actual, _, chosen = rollout(model, "auto")
    assert torch.equal(actual, expected) and "out of registers" in str(chosen.report()["refused"])


def test_a_refusal_is_one_line_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_attention, "why_not", lambda *_: "the kernels run on a GPU")
    model = pair(pico.VARIANTS[0])
    with pytest.raises(
        UserError, match=r"no kernel for the attention of layer 0 \(the kernels run on a GPU.*`kernels: auto`"
    ):
        rollout(model, "triton")
    expected, _, _ = rollout(model, "torch")
    actual, _, chosen = rollout(model, "auto")
    assert torch.equal(actual, expected)
    assert chosen.report()["refused"] == {path: ["the kernels run on a GPU"] for path in fused.PATHS}


def test_gradients_go_through_torch() -> None:
    model = pair(pico.VARIANTS[0]).requires_grad_(True)
    latents, timestep, text = (x.to(DEVICE) for x in pico.inputs(2, 2, HEIGHT, WIDTH))
    chosen = model.set_kernels("triton")
    model.forward_chunk(latents, timestep, text, model.init_cache(2, HEIGHT, WIDTH)).sum().backward()
    assert chosen.choices == {}


def test_the_rule_is_the_cheaper_way() -> None:
    """Wan2.1-1.3B, window of 32,760 keys: rank 192 is expanded for a chunk of 4,680 queries, rank 64 absorbed."""

    class Layer:
        heads, rank, key_channels = 12, 192, 96
        rope_pairs = list(range(16))
        mla = type("Config", (), {"v_head_dim": 128})

    def cheaper(rank: int, queries: int) -> str:
        layer = Layer()
        layer.rank = rank
        shape = Shape(1, queries, 32760, torch.bfloat16, "cuda")
        return min(fused.PATHS, key=lambda path: operations(layer, shape, path))

    assert [cheaper(192, queries) for queries in (64, 256, 512, 4680)] == ["absorbed", "absorbed", "expand", "expand"]
    assert cheaper(64, 4680) == "absorbed"


def test_the_report_names_a_reason_once() -> None:
    chosen = Kernels("auto")
    shape = Shape(1, 2, 3, torch.float32, "cpu")
    for layer in range(3):
        chosen.choices[layer, shape] = Choice("torch", {"absorbed": "no", "expand": "neither"})
    assert chosen.report() == {
        "mode": "auto",
        "paths": {"torch": 3},
        "refused": {"absorbed": ["no"], "expand": ["neither"]},
    }
    assert set(kernels.CHECK) == {torch.float32, torch.float16, torch.bfloat16}
