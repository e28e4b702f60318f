"""Streaming attention with kernels, in Triton's interpreter if there is no GPU, compared with plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mla_attention
import pico
import pytest
import torch

from mla_convert.errors import UserError
from mla_convert.mla import costs, fused, kernels
from mla_convert.mla.core import Expansion
from mla_convert.mla.costs import WAYS, Costs, cost
from mla_convert.mla.kernels import Choice, Kernels, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Observed in float32 on the CPU, by sums in another order: 2.2e-7 in velocities, 5.3e-6 in rows, which are small beside
# the products that they sum.
FLOAT32, ROWS = 5e-6, 2e-5
FRAMES, HEIGHT, WIDTH = 6, 6, 4
REFUSAL = mla_attention.why_not(DEVICE, torch.float32)
needs_kernels = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


def pair(variant: dict[str, Any] | None, layers: int = 1, **settings: Any) -> Any:
    """A tiny dense model, or its conversion, on the kernels' device."""
    dense = pico.dense_model(heads=3, layers=layers)
    model = dense if variant is None else pico.convert(dense, **variant, **settings)
    return model.to(DEVICE)


def rollout(model: Any, mode: str, history: str = "pass", passes: int = 1) -> tuple[torch.Tensor, Any, Kernels]:
    """Velocities of a rollout in which each chunk takes several passes and is then written; its cache and choices."""
    latents, timestep, text = (x.to(DEVICE) for x in pico.inputs(1, FRAMES, HEIGHT, WIDTH))
    chosen = model.set_kernels(mode, history)
    cache, found = model.init_cache(1, HEIGHT, WIDTH), []
    with torch.no_grad():
        for start, stop in model.causal.chunks(FRAMES):
            chunk = latents[:, :, start:stop]
            for index in range(passes):
                found.append(model.forward_chunk(chunk + index, timestep[:, start:stop], text, cache))
            model.forward_chunk(chunk, timestep[:, start:stop], text, cache, write=True)
    return torch.cat(found, dim=2), cache, chosen


CASES = [(None, False), *((variant, False) for variant in pico.VARIANTS)]
CASES += [(variant, True) for variant in pico.VARIANTS if variant["own_chunk"] == "exact"]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes kernels on a CPU and, on a GPU, in float32, too."""
    monkeypatch.setattr(kernels, "left_to_torch", lambda shape: None)


def same(model: Any, history: str = "pass", passes: int = 1) -> Kernels:
    """Check that a rollout with kernels gives torch's velocities and rows; returns what was chosen."""
    expected, rows, _ = rollout(model, "torch", passes=passes)
    actual, kernel_rows, chosen = rollout(model, "triton", history, passes)
    assert pico.relative_error(actual, expected) < FLOAT32
    for ours, theirs in zip(kernel_rows.rows, rows.rows, strict=True):
        assert pico.relative_error(ours, theirs) < ROWS
    return chosen


@needs_kernels
@pytest.mark.parametrize(
    ("variant", "mean"), CASES, ids=lambda v: v if not isinstance(v, dict) else f"{v['position']}-{v['own_chunk']}"
)
def test_kernels_equal_torch(variant: dict[str, Any] | None, mean: bool) -> None:
    """A cached shared key without a mean is absorbed; everything else is expanded."""
    (path,) = same(pair(variant, key_mean=mean)).report()["paths"]
    absorbed = variant is not None and variant["position"] in ("decoupled", "baked") and not mean
    assert path.partition(",")[0] == ("absorbed" if absorbed else "expand")


@needs_kernels
@pytest.mark.parametrize("position", [None, "derived", "rotate_on_read"])
def test_history_kept_for_the_passes_of_a_chunk(position: str | None) -> None:
    variant = next((v for v in pico.VARIANTS if v["position"] == position), None)
    assert same(pair(variant, layers=2), "chunk", passes=2).report()["history"][0] == "chunk"


@needs_kernels
@pytest.mark.usefixtures("interpreted")
def test_auto_leaves_a_kernel_that_disagrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(pico.VARIANTS[0])
    expected, _, _ = rollout(model, "torch")
    whole = fused.attention
    monkeypatch.setattr(fused, "attention", lambda *arguments: 1.1 * whole(*arguments))
    actual, _, chosen = rollout(model, "auto")
    report = chosen.report()
    assert report["paths"] == {"torch": 1} and "differs from torch by" in str(report["refused"])
    assert torch.equal(actual, expected)


@needs_kernels
@pytest.mark.usefixtures("interpreted")
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


@needs_kernels
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("lacking", [None, "Triton cannot compile its launchers: no C compiler; install gcc"])
def test_what_does_not_compile_is_tried_once_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacking: str | None
) -> None:
    """One layer fails, the others of its shape are not tried; without a compiler nothing of any shape is."""
    tried: list[int] = []

    def broken(layer: Any, *_: Any) -> Any:
        tried.append(layer.layer)
        raise RuntimeError("out of registers" if lacking is None else "Failed to find C compiler.")

    model = pair({**pico.VARIANTS[0], "kv_lora_rank": [6, 6, 7, 6]}, layers=4)
    expected, _, _ = rollout(model, "torch")
    monkeypatch.setattr(fused, "attention", broken)
    monkeypatch.setattr(mla_attention, "lacking", lambda: lacking)
    actual, _, chosen = rollout(model, "auto")
    # Another rank is another kernel.
    assert tried == ([0, 2] if lacking is None else [0])
    assert torch.equal(actual, expected) and chosen.report()["paths"] == {"torch": 4}
    messages = [message for message in caplog.messages if "torch attends in" in message]
    assert len(messages) == len(tried)
    assert messages[0] == (
        "kernels: torch attends in layer 0 and others of its shape from now on: "
        "expand failed: RuntimeError: out of registers"
        if lacking is None
        else f"kernels: torch attends in every layer from now on: {lacking}"
    )
    if lacking is not None:
        with pytest.raises(UserError, match="install gcc, or set kernels: auto"):
            rollout(model, "triton")


@needs_kernels
@pytest.mark.usefixtures("interpreted")
def test_every_device_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs one is too old; what was chosen on the other does not hold for it."""
    asked: list[str] = []

    def why_not(device: str, _: torch.dtype) -> str | None:
        asked.append(device)
        return "too old" if device == "cuda:1" else None

    monkeypatch.setattr(mla_attention, "why_not", why_not)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    layer = pair(pico.VARIANTS[0]).blocks[0].attn1
    cache = pico.convert(pico.dense_model(), **pico.VARIANTS[0]).init_cache(1, HEIGHT, WIDTH, dtype=torch.bfloat16)
    chosen, step = Kernels("auto"), SimpleNamespace(cache=cache, views=[], share=None)
    paths = []
    for device in (0, 1, 0):
        tokens: Any = SimpleNamespace(shape=(1, 48, 36), dtype=torch.bfloat16, device=torch.device("cuda", device))
        paths.append(chosen.found.choices[chosen._choose(layer, tokens, step)].path)
    assert paths[0] == paths[2] != "torch" and paths[1] == "torch"
    assert set(asked) == {"cuda:0", "cuda:1"}


@needs_kernels
@pytest.mark.usefixtures("interpreted")
def test_auto_goes_on_where_torch_has_no_memory_to_compare(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    model = pair(pico.VARIANTS[0])
    expected, _, _ = rollout(model, "torch")
    monkeypatch.setattr(model.blocks[0].attn1, "eager_attention", too_large)
    actual, _, chosen = rollout(model, "auto")
    assert pico.relative_error(actual, expected) < FLOAT32
    assert "torch" not in chosen.report()["paths"]
    # With and without history, and where rows are written, too.
    assert caplog.text.count("does not fit in memory, so nothing is compared") == 4


@needs_kernels
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_an_output_that_proves_nothing_does_not_decide(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(pico.VARIANTS[0])
    layer, chosen = model.blocks[0].attn1, model.set_kernels("auto")
    latents, timestep, text = (x.to(DEVICE) for x in pico.inputs(1, 2, HEIGHT, WIDTH))
    eager = layer.eager_attention

    def attends() -> None:
        with torch.no_grad():
            model.forward_chunk(latents, timestep, text, model.init_cache(1, HEIGHT, WIDTH))

    with monkeypatch.context() as patch:
        patch.setattr(layer, "eager_attention", lambda x, step: torch.full_like(eager(x, step), value))
        attends()
    assert not chosen.found.checked and "torch" not in chosen.report()["paths"]
    attends()
    assert len(chosen.found.checked) == 1 and "torch" not in chosen.report()["paths"]


@needs_kernels
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("error", "named"), [("Failed to find C compiler.", True), ("out of registers", False)])
def test_a_missing_compiler_is_named_only_where_it_was_asked_for(
    error: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers compiled before need none, so other errors are those of a kernel."""

    def broken(*_: Any) -> Any:
        raise RuntimeError(error)

    monkeypatch.setattr(mla_attention, "lacking", lambda: "no C compiler; install gcc")
    monkeypatch.setattr(fused, "attention", broken)
    chosen = rollout(pair(pico.VARIANTS[0]), "auto")[2]
    assert (None in chosen.found.failed) == named and len(chosen.found.failed) == 1
    with pytest.raises(UserError if named else RuntimeError, match="install gcc" if named else error):
        rollout(pair(pico.VARIANTS[0]), "triton")


@needs_kernels
@pytest.mark.usefixtures("interpreted")
def test_more_items_are_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(pico.VARIANTS[6])
    layer = model.blocks[0].attn1
    compared, eager = [], layer.eager_attention
    monkeypatch.setattr(layer, "eager_attention", lambda x, step: compared.append(len(x)) or eager(x, step))
    model.set_kernels("auto")
    with torch.no_grad():
        for batch in (1, 3):
            latents, timestep, text = (x.to(DEVICE) for x in pico.inputs(batch, 2, HEIGHT, WIDTH))
            model.forward_chunk(latents, timestep, text, model.init_cache(batch, HEIGHT, WIDTH))
    assert compared == [1]


def test_float32_on_a_gpu_is_left_to_torch() -> None:
    """Without tensor cores for 16 bits, the kernels would be slower than torch."""
    shape = Shape(1, 4680, 32760, torch.float32, "cuda", "LatentCache")
    unasked: Any = None
    choice = kernels.choose(unasked, shape, unasked, "auto", unasked)
    assert choice == Choice("torch", dict.fromkeys(fused.PATHS, kernels.FLOAT32_DEFAULT))


@pytest.mark.usefixtures("interpreted")
def test_a_refusal_is_one_line_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_attention, "why_not", lambda *_: "the kernels run on a GPU")
    model = pair(pico.VARIANTS[0])
    with pytest.raises(
        UserError, match=r"no kernel for the attention of layer 0 \(the kernels run on a GPU.*set kernels: auto"
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
    assert chosen.found.choices == {}


class WanLayer:
    """The rule's inputs for a layer of Wan2.1-1.3B."""

    heads, rank, expansion = 12, 192, Expansion(96, 32, 0, 128, one_query=False)


def cheaper(rank: int, queries: int, prices: Costs) -> str:
    layer: Any = WanLayer()
    layer.rank = rank
    return min(fused.PATHS, key=lambda path: cost(layer, queries, 32760, path, "attend", prices))


def test_the_rule_is_the_cheaper_way() -> None:
    """Wan2.1-1.3B, window of 32,760 keys: rank 192 is expanded for a chunk of 4,680 queries, rank 64 absorbed."""
    prices = costs.for_device(torch.device("cpu"))
    assert prices.device == "default"
    found = [cheaper(192, queries, prices) for queries in (64, 256, 512, 4680)]
    assert found == ["absorbed", "absorbed", "expand", "expand"]
    assert cheaper(64, 4680, prices) == "absorbed"


def test_a_mean_key_is_attended_to() -> None:
    layer: Any = WanLayer()
    plain = costs.operations(layer, 10, 20, "expand")
    layer.expansion = layer.expansion._replace(mean=128)
    assert costs.operations(layer, 10, 20, "expand") == (plain[0], plain[1] + 12 * 10 * 20 * 128)


def test_the_table_of_a_device_moves_the_break_even() -> None:
    measured = Costs("a GPU", "a test", (128, 4680), dict.fromkeys(WAYS, (1.0, 1.0)) | {"absorbed": (0.5, 2.0)}, 1.0)
    assert measured.price("absorbed", 500) == 0.5 and measured.price("absorbed", 1560) == 2.0
    assert cheaper(192, 512, measured) == "absorbed" and cheaper(64, 4680, measured) == "expand"


def test_every_entry_of_the_committed_table_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert costs.DEFAULT in costs.table()
    broken = json.loads(costs.TABLE.read_text())
    broken["default"]["attention"]["absorbed"] = [1.0, 2.0]
    (tmp_path / "table.json").write_text(json.dumps(broken))
    monkeypatch.setattr(costs, "TABLE", tmp_path / "table.json")
    with pytest.raises(ValueError, match=r"the entry 'default' of table.json needs a price above 0 for each of \[1\]"):
        costs.table.__wrapped__()


def test_on_a_cpu_torch_is_the_default() -> None:
    """`auto` uses no kernel there, not even in the interpreter, and says so once."""
    model = pair(pico.VARIANTS[0])
    if DEVICE != "cpu":
        pytest.skip("a GPU is here")
    expected, _, _ = rollout(model, "torch")
    actual, _, chosen = rollout(model, "auto")
    assert torch.equal(actual, expected)
    assert chosen.report() == {
        "mode": "auto",
        "paths": {"torch": 1},
        "refused": {path: [kernels.CPU_DEFAULT] for path in fused.PATHS},
        "history": None,
    }
    assert kernels.describe(chosen.report()) == f"kernels: auto: 1 x torch; not taken: {kernels.CPU_DEFAULT}"


def test_the_choice_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mla_convert")
    chosen = rollout(pair(pico.VARIANTS[0]), "torch")[2]
    for _ in range(2):
        chosen.announce()
    assert caplog.messages == ["kernels: torch attends, as requested"]


@needs_kernels
@pytest.mark.parametrize(("free", "taken"), [(None, "pass"), (10**9, "chunk"), (1000, "pass")])
def test_history_is_kept_where_memory_allows(free: int | None, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_memory", lambda device: free)
    model = pair(pico.VARIANTS[6])
    report = rollout(model, "triton", "auto")[2].report()
    # One item, a window of 5 frames of 6 tokens, 3 heads of 12 + 12 channels, float32, one layer.
    assert report["history"][0] == taken
    if free is not None:
        assert report["history"][1] == f"{30 * 3 * 24 * 4 / 1e9:.2f} GB of {free / 1e9:.2f} GB free"
    assert f"history expanded once per {taken}" in kernels.describe(report)


@needs_kernels
@pytest.mark.parametrize(("reserved", "taken"), [(0, "chunk"), (999_900_000, "pass")])
def test_what_others_will_take_is_not_free(reserved: int, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_memory", lambda device: 10**9)
    known = Kernels.__init__
    monkeypatch.setattr(Kernels, "__init__", lambda self, *given: known(self, *given) or self.leave_free(reserved))
    # Six layers of 8,640 bytes: more than half of the 100,000 that are left.
    history = rollout(pair(pico.VARIANTS[6], layers=6), "triton", "auto")[2].report()["history"]
    assert history[0] == taken
    assert history[1].partition(" free")[2] == (", less 1.00 GB for decoding" if reserved else "")


@needs_kernels
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_a_kernel_that_finds_no_memory_is_not_left_for_good(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> Any:
        raise error

    model = pair(pico.VARIANTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(fused, "attention", too_large)
        with pytest.raises(type(error)):
            rollout(model, "auto")
        chosen = model.kernels
    assert "torch" not in chosen.report()["paths"] and not chosen.found.checked and not chosen.found.failed
    assert "torch" not in rollout(model, "auto")[2].report()["paths"]


@needs_kernels
def test_stock_attention_where_one_softmax_is_all() -> None:
    """torch's attention is used where it suffices, at equal cost; our own attends where parts are merged."""
    assert rollout(pair(None), "triton")[2].report()["paths"] == {"expand, sdpa": 1}
    assert rollout(pair(pico.VARIANTS[2]), "triton")[2].report()["paths"] == {"expand, attend": 1}


def test_the_report_names_a_reason_once() -> None:
    chosen = Kernels("auto")
    shape = Shape(1, 2, 3, torch.float32, "cpu", "LatentCache")
    for layer in range(3):
        chosen.found.choices[layer, shape] = Choice("torch", {"absorbed": "no", "expand": "neither"})
    assert chosen.report() == {
        "mode": "auto",
        "paths": {"torch": 3},
        "refused": {"absorbed": ["no"], "expand": ["neither"]},
        "history": None,
    }
    assert kernels.describe(chosen.report()) == "kernels: auto: 3 x torch; not taken: no; neither"
    assert set(kernels.CHECK) == {torch.float32, torch.float16, torch.bfloat16}
