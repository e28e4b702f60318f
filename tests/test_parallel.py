"""Several processes that share the chunks of one video make what a process alone makes."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path
from typing import Any

import mla_attention
import pico
import pytest
import share_case
import torch
from launched import launched

from mla_convert import StreamingMLAPipeline
from mla_convert.errors import UsageError, UserError
from mla_convert.mla.graph import why_not_graph
from mla_convert.mla.parallel import Share
from mla_convert.run import pipeline
from mla_convert.run.batch import StreamBatch

# Relative to the largest magnitude. Observed 0 to 1.4e-7; without its self-attention, a model is 6e-2 apart.
FLOAT32 = 1e-6
SLOW = ("kernels", "compiled")
REFUSAL = mla_attention.why_not("cpu", torch.float32)


@pytest.fixture(scope="module", params=[2, 3])
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    """What the processes of a launch of two, or of three without the slow cases, have found."""
    count, out = request.param, tmp_path_factory.mktemp("shared")
    slow = "yes" if count == 2 and REFUSAL is None else "no"
    done = launched(count, Path(share_case.__file__), str(out), slow, "cpu")
    assert all(one.code == 0 for one in done), [one.err for one in done]
    return count, [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]


def test_processes_that_begin_differently_are_refused(found: tuple[int, list[dict[str, Any]]]) -> None:
    assert all(one["different"] == {"noise": True, "prompts": True} for one in found[1]), found[1]


@pytest.mark.parametrize("case", [case for case in share_case.CASES if case != share_case.ON_GPU])
def test_a_shared_rollout_equals_one_alone(case: str, found: tuple[int, list[dict[str, Any]]]) -> None:
    errors = [one.get(case) for one in found[1]]
    if case.startswith(SLOW) and errors[0] is None:
        pytest.skip("checked by two processes, where kernels can be interpreted")
    assert all(error < FLOAT32 for error in errors), errors


def test_what_is_sent_and_cached(found: tuple[int, list[dict[str, Any]]]) -> None:
    """The formulas of docs/generate.md, for two layers and the chunk's tokens, 30, in unequal parts if need be."""
    count, results = found
    model, tokens = share_case.model_of(share_case.EXACT), 30
    width, row, patch = share_case.HEADS * 12, model.row_widths[0], 8
    for rank, result in enumerate(results):
        own = tokens // count + (rank < tokens % count)
        others = own * (count - 1)
        exchanged, velocity = others * width // count, others * patch
        assert result["sent"] == {
            "dense": [2 * 4 * exchanged + velocity, 2 * 6 * exchanged + velocity],
            "exact": [2 * 4 * exchanged + velocity, 2 * (4 * exchanged + others * row) + velocity],
            # What the own chunk is restored from is also what is written.
            "latent": [2 * (2 * exchanged + others * row) + velocity] * 2,
        }
        whole, share = result["cache"]
        assert share * count == whole


def group(size: int, rank: int = 0) -> Any:
    """The size of a group and the place in it, which is all that is read before anything is exchanged."""
    return types.SimpleNamespace(size=lambda: size, rank=lambda: rank)


def test_tokens_and_heads_are_divided_without_gaps() -> None:
    for count, tokens in itertools.product((1, 2, 3, 5), (5, 30, 31, 34)):
        shares = [Share(group(count, rank), tokens) for rank in range(count)]
        assert [token for one in shares for token in range(tokens)[one.tokens]] == list(range(tokens))
        assert shares[0].sizes == [one.tokens.stop - one.tokens.start for one in shares]
        heads = [head for one in shares for head in range(30)[one.heads(30)]]
        assert heads == list(range(30))
        assert max(shares[0].sizes) - min(shares[0].sizes) <= 1


def test_runs_of_tokens_become_one_per_token() -> None:
    runs = torch.arange(3).view(1, 3, 1)
    parts = [Share(group(2, rank), 12).runs(runs, 12) for rank in range(2)]
    assert torch.cat(parts, dim=1).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert Share(group(2), 12).runs(runs[:, :1], 12).shape == (1, 1, 1)


def test_what_cannot_be_shared_is_refused() -> None:
    model = share_case.model_of()
    with pytest.raises(
        UserError, match=r"^4 processes cannot divide 6 attention heads equally; use one of 1, 2, 3, 6$"
    ):
        model.set_parallel(group(4))
    assert model.parallel is None
    model.set_parallel(group(6))
    latents, timestep, text = pico.inputs(1, 1, 2, 6)
    cache = model.init_cache(1, 2, 6)
    with torch.no_grad(), pytest.raises(ValueError, match="a chunk of 3 tokens cannot be divided among 6 processes"):
        model.forward_chunk(latents, timestep, text, cache)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"without gradients only; call set_parallel\(None\) before training"):
        model.forward_chunk(latents, timestep, text, cache)
    model.set_parallel(None)
    with pytest.raises(ValueError, match="the cache was made for another number of processes; make it after"):
        model.forward_chunk(latents, timestep, text, cache)


def test_a_pipeline_streams_one_video_at_a_time() -> None:
    pipe = StreamingMLAPipeline(share_case.model_of())
    pipe.transformer.set_parallel(group(2))
    settings = {"prompt_embeds": torch.zeros(1, 3, 8), "height": 80, "width": 48, "output_type": "latent"}
    first = pipe.stream(**settings)
    with pytest.raises(UsageError, match="stream one video at a time; finish or close the other one"):
        pipe.stream(**settings)
    first.close()
    pipe.stream(**settings)


@pytest.mark.parametrize(("shared", "ahead"), [(True, 0), (False, 2)])
def test_processes_leave_a_stream_at_the_same_step(shared: bool, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thread in each, they would be at different ones, and pair what they exchange afterwards wrongly."""
    used = []

    def prefetched(made: Any, count: int, closed: Any) -> Any:
        used.append(count)
        return made

    monkeypatch.setattr(pipeline, "prefetch", prefetched)
    pipe = StreamingMLAPipeline(share_case.model_of())
    pipe.transformer.set_parallel(group(2) if shared else None)
    text = torch.zeros(1, 3, 8)
    pipe.stream(prompt_embeds=text, height=80, width=48, output_type="latent", ahead=2).close()
    assert used == [ahead]


def test_kernels_are_chosen_anew_by_all_processes() -> None:
    """What one of them found before, the others would compare, and wait for it."""
    model = share_case.model_of()
    kernels = model.set_kernels("auto")
    kernels.found.failed[None] = "the interpreter is slow"
    model.set_parallel(group(2))
    assert model.kernels is kernels and not kernels.found.failed


def test_what_begins_a_stream_of_a_pool_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk has another view of the pool, and every comparison is an exchange that the host waits for."""
    compared: list[Any] = []
    monkeypatch.setattr(Share, "check_same", lambda self, x: compared.append(x))
    monkeypatch.setattr(Share, "_exchange", lambda self, sent, *sizes: sent)
    model = share_case.model_of()
    model.set_parallel(group(1))
    batch, counts = StreamBatch(model, 2, 2, 6, num_inference_steps=2), []
    for number in range(6):
        if number in (0, 3):
            batch.join(torch.zeros(3, 8))
        batch.step()
        counts.append(len(compared))
        compared.clear()
    # Tokens and text.
    assert counts == [2, 0, 0, 2, 0, 0]


def test_graphs_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = share_case.model_of()
    model.set_kernels("auto")
    model.set_parallel(group(2))
    cache = model.init_cache(1, 2, 6)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert why_not_graph(model, cache) == "several processes share each chunk, and their exchanges are not captured"
