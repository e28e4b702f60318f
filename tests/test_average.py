"""The average of trained weights: its arithmetic, and how it trades places with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mla_convert.distill.average import Average


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}


def begun(warmup: bool = True) -> Average:
    return Average({name: nn.Parameter(weight) for name, weight in weights_of(0).items()}, 0.5, warmup)


def trained_to(average: Average, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in average.trained.items():
            parameter.copy_(weights[name])


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# The warm-up reaches 0.5 at the ninth update.
@pytest.mark.parametrize(
    ("warmup", "decays"),
    [(True, [0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]), (False, [0, 0.5, 0.5])],
)
def test_the_decay_of_every_update(warmup, decays):
    average = begun(warmup)
    expected = {name: weight.double() for name, weight in average.weights.items()}
    for number, decay in enumerate(decays, start=1):
        trained_to(average, weights_of(number))
        average.step()
        expected = {name: decay * expected[name] + (1 - decay) * weights_of(number)[name] for name in expected}
        assert average.steps == number
        # Observed: 2e-7.
        assert all((average.weights[name] - expected[name]).abs().max() < 1e-6 for name in expected)
        assert number > 1 or equal(average.weights, weights_of(1))


def test_a_number_of_updates_that_was_read_goes_on():
    average = begun()
    average.loaded(19)
    before = copies(average.weights)
    trained_to(average, weights_of(1))
    average.step()
    assert average.steps == 20
    assert equal(average.weights, {name: before[name].lerp(weights_of(1)[name], 0.5) for name in before})


@pytest.mark.parametrize("fails", [False, True])
def test_in_place_the_average_and_the_weights_trade_places(fails):
    average = begun()
    for number in (1, 2):
        trained_to(average, weights_of(number))
        average.step()
    averaged, trained = copies(average.weights), copies(average.trained)
    memory = [tensor.data_ptr() for tensor in (*average.trained.values(), *average.weights.values())]
    assert not equal(averaged, trained)
    try:
        with average.in_place():
            assert equal(copies(average.trained), averaged)
            assert equal(average.weights, trained)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert equal(copies(average.trained), trained)
    assert equal(average.weights, averaged)
    assert [tensor.data_ptr() for tensor in (*average.trained.values(), *average.weights.values())] == memory
    assert all(parameter.requires_grad for parameter in average.trained.values())


def test_a_stage_ends_with_the_average():
    average = begun()
    for number in (1, 2):
        trained_to(average, weights_of(number))
        average.step()
    average.copy_to_trained()
    assert equal(copies(average.trained), average.weights)
