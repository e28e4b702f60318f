"""Common features of diffusers models work with a converted model."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ContextParallelConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from pico import LAYOUTS, WINDOW, convert, dense_model, inputs, relative_error, stream
from pretend_gpu import GPU, pretended
from safetensors.torch import load_file

from mla_convert.errors import UserError
from mla_convert.mla.plain import changed_module

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


@pytest.mark.parametrize("family", ["wan", "skyreels_v2", "anyflow_far"])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offloading_moves_what_a_pass_reads(family, level):
    """Also the rotary table, whose module is never called."""
    dense = dense_model(family=family, layers=1, causal=None if family == "anyflow_far" else WINDOW)
    layouts = [None] if family == "anyflow_far" or level == "block_level" else [None, *LAYOUTS]
    for layout in layouts:
        model = dense if layout is None else convert(copy.deepcopy(dense), **layout)
        expected, streamed = forward(model), stream(model, LATENTS, TIMESTEP, TEXT)[0]
        with pretended(), torch.no_grad():
            there = copy.deepcopy(model)
            more = {"num_blocks_per_group": 1} if level == "block_level" else {}
            there.enable_group_offload(GPU, torch.device("cpu"), offload_type=level, **more)
            given = [x.to("cuda") for x in (LATENTS, TIMESTEP, TEXT)]
            assert relative_error(there(*given).sample.cpu(), expected) < 1e-5
            cache = there.init_cache(1, 4, 4)
            out = [
                there(given[0][:, :, a:b], given[1][:, a:b], given[2], cache=cache, write=True)
                for a, b in there.causal.chunks(LATENTS.shape[2])
            ]
            assert relative_error(torch.cat(out, dim=2).cpu(), streamed) < 1e-5


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_the_cache_of_an_offloaded_model_is_where_it_computes(converted, offload_buffers):
    model = cpu_offload(copy.deepcopy(converted), torch.device("cpu"), offload_buffers=offload_buffers)
    assert model.device.type == "meta"
    assert model.init_cache(1, 4, 4).rows[0].device.type == "cpu"


@pytest.mark.parametrize(
    "config",
    [
        TaylorSeerCacheConfig(use_lite_mode=True),
        PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ],
)
def test_caches_of_diffusers_are_refused(converted, config):
    model = copy.deepcopy(converted)
    with pytest.raises(UserError, match=f"enable_cache .{type(config).__name__}"):
        model.enable_cache(config)
    assert torch.equal(forward(model), forward(converted))


def test_context_parallelism_is_refused(converted):
    with pytest.raises(UserError, match="enable_parallelism"):
        converted.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def test_an_attention_backend_says_what_it_reaches(converted, caplog):
    model = copy.deepcopy(converted)
    # Another one would be the default of every model in this process from now on.
    model.set_attention_backend("native")
    assert "cross-attention only; self-attention follows set_kernels" in caplog.text
    assert model.blocks[0].attn2.processor._attention_backend == "native"


def test_weights_that_are_no_plain_numbers_are_left_to_torch(converted):
    """Such as torchao's, whose layers stay `nn.Linear`."""

    class Quantized(torch.Tensor):
        pass

    attention = copy.deepcopy(converted).blocks[0].attn1
    assert changed_module(attention) is None
    projection = attention.kv_b_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().as_subclass(Quantized), False)
    assert changed_module(attention) == "kv_b_proj"


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
