"""A LoRA that changes while a model streams, also where passes are replayed as in a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig
from test_graph import Tape

from mla_convert.errors import UserError
from mla_convert.mla import graph
from mla_convert.mla.graph import GraphedChunk

FRAMES = 2
LATENTS, TIMESTEP, TEXT = pico.inputs(1, FRAMES, 4, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    made = pico.convert(pico.dense_model(layers=1), position="rotate_on_read", kv_lora_rank=20)
    made.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q", "ffn.net.0.proj"], init_lora_weights=False))
    return made


def hook(model: Any) -> None:
    model.proj_out.register_forward_hook(lambda module, inputs, output: 2 * output)


def replace(model: Any) -> None:
    """As a hot-swap to a larger rank does."""
    layer = model.blocks[0].attn2.to_q.lora_A["default"]
    layer.weight = torch.nn.Parameter(layer.weight.detach() / 2)


CHANGES: dict[str, Any] = {
    "replace": replace,
    "scale": lambda model: model.set_adapters("default", 0.3),
    "disable": lambda model: model.disable_adapters(),
    "fuse": lambda model: model.fuse_lora(),
    "remove": lambda model: model.delete_adapters("default"),
    "hook": hook,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_replay_has_the_adapters_of_its_pass(model: Any, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change comes between the passes of a chunk, as in a callback, when a graph has been captured."""

    monkeypatch.setattr(graph, "CUDARecorder", lambda device, beside: Tape(beside))

    def rolled_out(graphed: bool) -> tuple[list[torch.Tensor], Any]:
        streamed = copy.deepcopy(model)
        cache = streamed.init_cache(1, 4, 4)
        passes = GraphedChunk(streamed, cache) if graphed else None
        out = []
        for chunk in range(6):
            for step in range(2):
                if (chunk, step) == (4, 1):
                    assert passes is None or passes.graphs
                    CHANGES[change](streamed)
                with torch.no_grad():
                    run = passes or (lambda *given: streamed(*given, cache=cache))
                    out.append(run(LATENTS, TIMESTEP[:, 0], TEXT).clone())
            with torch.no_grad():
                streamed(LATENTS, TIMESTEP[:, 0], TEXT, cache=cache, write=True)
        return out, passes

    expected, _ = rolled_out(False)
    actual, passes = rolled_out(True)
    assert max(map(pico.relative_error, actual, expected)) < 1e-5
    assert passes.graphs


def test_a_lora_of_a_query_that_was_split_is_refused() -> None:
    model = pico.convert(pico.dense_model(layers=1), position="rotate_on_read", kv_lora_rank=20, q_lora_rank=8)
    names = [f"transformer.blocks.0.attn1.{name}.lora_{part}.weight" for name in ("to_q", "to_out.0") for part in "AB"]
    weights = {name: torch.ones(24, 2) if "lora_B" in name else torch.ones(2, 24) for name in names}
    with pytest.raises(UserError, match="q_lora_rank"):
        model.load_lora_adapter(weights)
