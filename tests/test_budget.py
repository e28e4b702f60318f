"""Ranks by layer: allotted correctly from the curves, measured correctly, and resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from mla_convert.convert import ConvertConfig, convert_model, convert_source
from mla_convert.convert import layers as layers_module
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.budget import Trace, allot, candidate_ranks, measured_curve
from mla_convert.convert.clips import enter_clips
from mla_convert.convert.config import Budget, CalibrationConfig
from mla_convert.convert.layers import Plans, convert_layers
from mla_convert.convert.limits import latent_scalars
from mla_convert.convert.store import TensorStore
from mla_convert.errors import UsageError
from mla_convert.families.base import AttentionGeometry
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source
from mla_convert.zoo.training import save_teacher

CALIBRATION = {"clips": 8, "batch_size": 4}


def test_what_lowers_the_error_most_for_a_scalar_comes_first() -> None:
    steep, flat = [(4, 1.0), (8, 0.1), (12, 0.01)], [(4, 0.05), (8, 0.04), (12, 0.03)]
    assert allot([steep, flat], Budget(scalars_per_token=8, rank_multiple=4), 8) == [12, 4]
    assert allot([flat, steep], Budget(loss_increase=0.2, rank_multiple=4), None) == [4, 8]


def test_a_plateau_is_looked_across() -> None:
    late, early = [(4, 1.0), (8, 1.0), (12, 0.0)], [(4, 0.3), (8, 0.2), (12, 0.1)]
    assert allot([late, early], Budget(scalars_per_token=8, rank_multiple=4), 8) == [12, 4]


def test_a_loss_out_of_reach_is_named() -> None:
    with pytest.raises(UsageError, match=r"loss_increase: 0\.001 is out of reach.*give 0\.5"):
        allot([[(4, 1.0), (8, 0.5)]], Budget(loss_increase=0.001, rank_multiple=4), None)


def test_candidates_are_multiples_up_to_twice_the_mean() -> None:
    assert candidate_ranks(Budget(scalars_per_token=28, rank_multiple=4), 28, 384)[-1] == 56
    assert all(rank % 16 == 0 for rank in candidate_ranks(Budget(reduction=0.927), 224, 3072))
    with pytest.raises(UsageError, match="12 scalars per token are less than rank_multiple 16"):
        candidate_ranks(Budget(scalars_per_token=12), 12, 384)


@pytest.mark.parametrize(
    ("settings", "step", "total"), [({"reduction": 0.9}, 384, 38400), ({"scalars_per_token": 4.35}, 1, 435)]
)
def test_rounding_loses_no_rank(settings: dict[str, float], step: int, total: int) -> None:
    """As floats, (1 - 0.9) * 3840 is a little less than 384 and 4.35 * 100 less than 435."""
    budget = Budget(**settings, rank_multiple=step)
    scalars = latent_scalars(AttentionGeometry(100, 15, 128), ConvertConfig(budget=budget))
    first, *_, last = candidate_ranks(budget, scalars, 3840)
    assert sum(allot([[(first, 1.0), (last, 0.1)]] * 100, budget, scalars)) == total


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": {}}, "one of scalars_per_token, reduction, loss_increase, got none"),
        ({"budget": {"reduction": 0.9, "loss_increase": 0.1}}, "got reduction, loss_increase"),
        ({"budget": {"reduction": 0.9}, "kv_lora_rank": 8}, "one of the two"),
        ({"budget": {"reduction": 0.9}, "init": "svd"}, "set init to activation"),
        ({"budget": {"reduction": 0.9}, "calibration": {"metric": "output"}}, "calibration.metric to velocity"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**settings)


def test_a_cached_shared_key_counts() -> None:
    budget = {"scalars_per_token": 16, "rank_multiple": 4}
    config = ConvertConfig(position="decoupled", qk_rope_head_dim=4, budget=budget, calibration=CALIBRATION)
    model = convert_model(FAMILY, pico.dense_model(layers=3), config, pico.batches())
    assert model.mla.scalars_per_token() <= 16
    assert all(rank % 4 == 0 for rank in model.mla.kv_lora_rank)


def test_a_curve_is_the_error_of_the_velocity() -> None:
    """Also of what context and noisy copies cause together: with a probe for every number, the curve is exact.

    It is the mean over clips, also if the last one is alone in its batch.
    """
    dense, other = pico.dense_model(layers=3), pico.dense_model(layers=3, seed=1).blocks[0].attn1
    batches = pico.batches_of_unequal_size(frames=4, height=2, width=2)
    store, blocks, layer = TensorStore(), ModelBlocks(dense), dense.blocks[0].attn1
    clips = enter_clips(blocks, batches, CalibrationConfig(**pico.calibration()), store)
    seen: list[torch.Tensor] = []

    def attended(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen[:] = (args[0].detach(), output.requires_grad_())
        return output

    traces, squares = [], []
    hook = layer.register_forward_hook(attended)
    for number, inputs in enumerate(clips.inputs):
        x = store[clips.key(0, number)]
        for block in dense.blocks:
            x = block(x, *inputs.shared)
        velocity = dense.leave(x, inputs)
        hidden, output = seen
        gradients = [torch.autograd.grad(v, output, retain_graph=True)[0] for v in velocity.flatten()]
        change = other(hidden, None, None, inputs.step) - output.detach()
        squares.append(torch.stack([(g * change).sum() for g in gradients]).square().view(len(velocity), -1))
        # Probes of one variance for all clips, though the second batch has a quarter of the first one's numbers.
        traces.append(Trace(hidden, inputs.step, [g * len(velocity) ** 0.5 for g in gradients]))
    hook.remove()
    expected = float(torch.cat(squares).mean())
    curve = measured_curve([layer], lambda rank: [other], [4], [traces])
    assert curve == [(4, pytest.approx(expected, rel=1e-4))]


def test_a_loss_increase_is_relative_to_the_mean_loss_of_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, batches, plans = pico.dense_model(), pico.batches_of_unequal_size(), Plans()
    monkeypatch.setattr(layers_module, "measured_curve", lambda dense, latent, ranks, traces: [(ranks[0], 1.0)])
    config = ConvertConfig(budget={"reduction": 0.6, "rank_multiple": 4}, calibration=CALIBRATION)
    convert_layers(ModelBlocks(dense), config, batches, 0, plans)
    clips = enter_clips(ModelBlocks(dense), batches, config.calibration, TensorStore())
    losses = []
    for number, inputs in enumerate(clips.inputs):
        x = clips.store[clips.key(0, number)]
        for block in dense.blocks:
            x = block(x, *inputs.shared)
        losses += [(dense.leave(x, inputs) - clips.targets[number]).square().mean((1, 2, 3, 4))]
    ((_, rise),) = plans.get(0).curve
    assert rise == pytest.approx(1 / float(torch.cat(losses).mean()), rel=1e-5)


def test_the_budget_is_kept_and_better_than_its_reverse() -> None:
    dense = pico.dense_model(layers=3)
    # A layer that hardly matters must not get the scalars.
    dense.blocks[1].attn1.to_out[0].weight.mul_(0.01)
    config = ConvertConfig(budget={"scalars_per_token": 16, "rank_multiple": 4}, calibration=CALIBRATION)
    model = convert_model(FAMILY, dense, config, pico.batches())
    ranks = model.mla.kv_lora_rank
    assert ranks[1] == 4 and sum(ranks) == 48
    clip = pico.inputs(4, 8, 6, 4, seed=20)
    expected = dense(*clip).sample
    errors = []
    for chosen in (list(ranks), [ranks[1], ranks[0], ranks[2]]):
        other = convert_model(
            FAMILY, dense, ConvertConfig(kv_lora_rank=chosen, calibration=CALIBRATION), pico.batches()
        )
        errors.append(float((other(*clip).sample - expected).square().mean()))
    assert errors[0] < errors[1]


def test_from_disk_it_is_the_same_and_resumes(tmp_path: Path) -> None:
    save_teacher(pico.dense_model(), tmp_path / "dense")
    source = load_source(str(tmp_path / "dense"))
    config = ConvertConfig(budget={"reduction": 0.6, "rank_multiple": 4}, calibration=CALIBRATION)
    whole = convert_model(FAMILY, load_dense(source), config, pico.batches()).state_dict()
    for _ in range(2):
        converted = convert_source(source, config, tmp_path / "work", pico.batches())
        assert {name: tuple(t.shape) for name, t in converted.model.state_dict().items()} == converted.tensors.shapes()
        assert all(torch.equal(converted.tensors[name], tensor) for name, tensor in whole.items())
