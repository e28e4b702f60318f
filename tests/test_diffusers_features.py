"""Common features of diffusers models work with a converted model."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from pico import convert, dense_model, inputs, relative_error, stream
from safetensors.torch import load_file

LATENTS, TIMESTEP, TEXT = inputs(1, 4, 4, 4)


@pytest.fixture(scope="module")
def converted():
    return convert(dense_model(), position="rotate_on_read", own_chunk="exact", init="svd", kv_lora_rank=20)


def forward(model):
    with torch.no_grad():
        return model(LATENTS, TIMESTEP, TEXT).sample


def test_compiles_in_one_graph(converted):
    torch.compiler.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual = compiled(LATENTS, TIMESTEP, TEXT).sample
    assert relative_error(actual, forward(converted)) < 1e-5


def test_group_offloading_changes_nothing(converted):
    model = copy.deepcopy(converted)
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(forward(model), forward(converted))
    streamed, _ = stream(model, LATENTS, TIMESTEP, TEXT)
    assert torch.equal(streamed, stream(converted, LATENTS, TIMESTEP, TEXT)[0])


def test_layerwise_casting_stores_less(converted):
    model = copy.deepcopy(converted)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    attention = model.blocks[0].attn1
    assert attention.kv_a_proj.weight.dtype == torch.float8_e4m3fn and attention.norm_k.weight.dtype == torch.float32
    # Three bits of mantissa, 6 % of a weight.
    assert relative_error(forward(model), forward(converted)) < 0.3


def test_a_lora_of_kept_projections_works(converted):
    model = copy.deepcopy(converted)
    model.add_adapter(
        LoraConfig(r=2, target_modules=["attn1.to_q", "attn2.to_k", "kv_b_proj"], init_lora_weights=False)
    )
    with_lora = forward(model)
    assert relative_error(with_lora, forward(converted)) > 1e-3
    model.disable_adapters()
    assert relative_error(forward(model), forward(converted)) < 1e-6


@pytest.mark.parametrize("own_forward", [False, True])
def test_a_lora_has_the_scale_that_it_is_asked_for(converted, own_forward):
    """As in stock models."""
    model = copy.deepcopy(converted)
    model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q", "ffn.net.0.proj"], init_lora_weights=False))

    def run(scale):
        cache = {"cache": model.init_cache(len(LATENTS), *LATENTS.shape[3:])} if own_forward else {}
        latents, timestep = (LATENTS[:, :, :2], TIMESTEP[:, :2]) if own_forward else (LATENTS, TIMESTEP)
        with torch.no_grad():
            out = model(latents, timestep, TEXT, attention_kwargs={"scale": scale}, **cache)
        return out if own_forward else out.sample

    whole, half, without = (run(scale) for scale in (1.0, 0.5, 0.0))
    model.disable_adapters()
    assert relative_error(without, run(1.0)) < 1e-6
    assert relative_error(whole, without) > 1e-3 and relative_error(half, without) > 1e-3
    assert relative_error(half, whole) > 1e-3


@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
def test_a_lora_of_the_source_loads_whole(tmp_path, own_chunk):
    dense = dense_model()
    model = convert(copy.deepcopy(dense), position="rotate_on_read", own_chunk=own_chunk, init="svd", kv_lora_rank=20)
    targets = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj"]
    dense.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    dense.save_lora_adapter(tmp_path)
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    model.load_lora_adapter(weights, prefix=None, adapter_name="default")
    loaded = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert loaded == {name for name, _ in dense.named_parameters() if ".lora_" in name}


def test_gradient_checkpointing_gives_the_same_gradients(converted):
    gradients = []
    for checkpointed in (False, True):
        model = copy.deepcopy(converted).requires_grad_(True)
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(LATENTS, TIMESTEP, TEXT).sample.square().mean().backward()
        gradients.append(model.blocks[0].attn1.kv_a_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
