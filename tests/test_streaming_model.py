"""Every family's models are a `StreamingModel`: each member is there, and each method takes the arguments it names."""

from __future__ import annotations

import inspect
from typing import Any

import pico
import pytest
import torch

from mla_convert import registry
from mla_convert.families.causal import CausalTransformer, LatentTransformer
from mla_convert.mla.cache import FrameCache
from mla_convert.mla.model import StreamingModel

MEMBERS = {*StreamingModel.__annotations__, *(name for name in vars(StreamingModel) if not name.startswith("_"))}
METHODS = sorted(name for name in MEMBERS if inspect.isfunction(getattr(StreamingModel, name, None)))
FAMILIES = sorted(pico.BUILDERS)


def signature(function: Any) -> dict[str, Any]:
    """Parameters by name with their defaults, without `self`."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> list[Any]:
    dense = pico.dense_model(family=request.param, causal={"num_frames_per_block": 2, "window_frames": 8})
    return [dense, pico.convert(dense, kv_lora_rank=6, position="rotate_on_read")]


def test_every_shipped_family_is_covered() -> None:
    shipped = {name for name, family in registry.families().items() if family.dense_class.__module__.startswith("mla_")}
    assert shipped == set(FAMILIES)
    assert {"init_cache", "rotary_table", "set_cache", "set_kernels"} < set(METHODS) < MEMBERS


def test_the_models_have_every_member(models: list[Any]) -> None:
    dense, latent = models
    assert isinstance(dense, CausalTransformer) and not isinstance(dense, LatentTransformer)
    assert isinstance(latent, LatentTransformer)
    for model in models:
        assert [name for name in sorted(MEMBERS) if not hasattr(model, name)] == []
        assert isinstance(model.dtype, torch.dtype) and isinstance(model.device, torch.device)
        assert isinstance(model.init_cache(1, 8, 8), FrameCache)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "named_modules"])
def test_their_methods_take_its_arguments(models: list[Any], method: str) -> None:
    for model in models:
        assert signature(getattr(type(model), method)) == signature(getattr(StreamingModel, method))


def test_their_forward_takes_the_arguments_of_a_call(models: list[Any]) -> None:
    """`nn.Module.__call__` takes anything, so mypy cannot compare it."""
    called = inspect.signature(StreamingModel.__call__).parameters.values()
    by_place = [parameter.name for parameter in called if parameter.kind is parameter.POSITIONAL_ONLY][1:]
    by_name = {parameter.name for parameter in called if parameter.kind is parameter.KEYWORD_ONLY}
    assert by_place and by_name
    for model in models:
        for function in (model.forward, model.forward_chunk):
            taken = list(inspect.signature(function).parameters)
            assert taken[: len(by_place)] == by_place and by_name < set(taken) and taken[-1] == "conditions"
