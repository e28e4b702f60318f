from __future__ import annotations

import io
import weakref
from typing import Any

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla_convert.errors import UsageError
from mla_convert.evaluate.geometry import PRESETS, from_model, gpu_memory, preset
from mla_convert.evaluate.memory import Plan, activation_bytes, plan, plan_table
from mla_convert.families.wan import CausalWanTransformer3DModel, MLAWanTransformer3DModel
from mla_convert.sizes import format_bytes


def preset_plan(name: str, **options: Any) -> Plan:
    known = preset(name)
    return plan(known.geometry, known.kv_lora_rank, known.qk_rope_head_dim, **options)


def test_the_paper_s_figures_for_wan_1_3b() -> None:
    result = preset_plan("wan2.1-t2v-1.3b", frames=21, tokens_per_frame=1560, dtype="bf16", gpu="H100").model_dump()
    assert (result["dense_scalars_per_token"], result["latent_scalars_per_token"]) == (3072, 224)
    assert isinstance(result["latent_scalars_per_token"], int)
    assert f"{result['reduction']:.1%}" == "92.7%"
    assert result["dense_cache_bytes"] == 3072 * 30 * 21 * 1560 * 2
    assert format_bytes(result["dense_cache_bytes"]) == "6.04 GB"
    assert format_bytes(result["latent_cache_bytes"], like=result["dense_cache_bytes"]) == "0.44 GB"
    assert result["seconds_of_context"] == 81 / 16
    assert (result["max_streams_dense"], result["max_streams_latent"]) == (11, 62)


def test_streams_are_what_fits_beside_the_weights() -> None:
    for gpu in ("RTX 4090", "H100", "B200"):
        result = preset_plan("wan2.1-t2v-1.3b", gpu=gpu)
        free = result.gpu_memory_bytes - result.weights_bytes - result.reserved_bytes
        for cache, streams in (
            (result.dense_cache_bytes, result.max_streams_dense),
            (result.latent_cache_bytes, result.max_streams_latent),
        ):
            stream = cache + result.activation_bytes
            assert streams * stream <= free < (streams + 1) * stream
    assert preset_plan("wan2.1-t2v-14b", gpu="RTX 4090").max_streams_latent == 0
    assert preset_plan("wan2.1-t2v-14b", gpu="RTX 4090").max_seconds_latent == 0


def test_the_longest_context_fits_and_one_frame_more_does_not() -> None:
    geometry = preset("wan2.1-t2v-1.3b").geometry
    longest = preset_plan("wan2.1-t2v-1.3b")
    frames = round((longest.max_seconds_dense * 16 - 1) / 4 + 1)
    assert geometry.seconds(frames) == longest.max_seconds_dense
    assert preset_plan("wan2.1-t2v-1.3b", frames=frames).max_streams_dense == 1
    assert preset_plan("wan2.1-t2v-1.3b", frames=frames + 1).max_streams_dense == 0
    assert longest.max_seconds_latent == geometry.seconds(1024), "no window is longer than the rotary table"


def test_options_change_what_they_name() -> None:
    base = preset_plan("wan2.1-t2v-1.3b")
    assert preset_plan("wan2.1-t2v-1.3b", dtype="float32").dense_cache_bytes == 2 * base.dense_cache_bytes
    assert preset_plan("wan2.1-t2v-1.3b", frames=42).latent_cache_bytes == 2 * base.latent_cache_bytes


def test_ranks_by_layer_give_their_mean() -> None:
    geometry = preset("digits").geometry
    result = plan(geometry, [20, 21, 22, 22], 8)
    assert result.latent_scalars_per_token == 29.25
    assert result.latent_scalars_by_layer == [28, 29, 30, 30]
    assert result.latent_cache_bytes == sum([28, 29, 30, 30]) * 10 * 16 * 2
    assert result.seconds_of_context == 10 / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_lora_rank": 385}, "kv_lora_rank 385 is out of range.*384"),
        ({"kv_lora_rank": 0}, "kv_lora_rank 0"),
        ({"kv_lora_rank": [20, 20]}, "2 entries for 4 layers"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 must be even"),
        ({"dtype": "bfloat61"}, "did you mean bfloat16?"),
        ({"frames": 0}, "frames must be above 0"),
        ({"gpu": "H1000"}, "unknown GPU 'H1000', did you mean 'H100'"),
        ({"gpu": "a100"}, "did you mean 'A100 40' or 'A100 80'?"),
    ],
)
def test_impossible_plans_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(preset("digits").geometry, **{"kv_lora_rank": 20, "qk_rope_head_dim": 8, **options})


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean wan2\.1-t2v-1\.3b\?"):
        preset("wan2.1-1.3b")


@pytest.mark.parametrize(
    ("text", "label", "size"),
    [
        ("h100", "H100 80 GB", 80 * 10**9),
        ("A100-40", "A100 40 GB", 40 * 10**9),
        ("a100 80GB", "A100 80 GB", 80 * 10**9),
        ("rtx4090", "RTX 4090 24 GB", 24 * 10**9),
        ("80", "80 GB", 80 * 10**9),
        ("79.5GiB", "79.5 GiB", int(79.5 * 2**30)),
    ],
)
def test_cards_by_name_and_by_size(text: str, label: str, size: int) -> None:
    assert gpu_memory(text) == (label, size)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (43008, "43.0 kB"),
        (999_499_999, "999 MB"),
        (999_999_999, "1.00 GB"),
        (6038323200, "6.04 GB"),
        (999_999_999_999_999, "1000 TB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_preset_parameters_are_those_of_the_models() -> None:
    def parameters(cls: type, **config: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in cls(**config).parameters())

    small = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    assert PRESETS["wan2.1-t2v-1.3b"].geometry.parameters == parameters(WanTransformer3DModel, **small)
    assert PRESETS["wan2.1-t2v-14b"].geometry.parameters == parameters(WanTransformer3DModel)
    skyreels = parameters(SkyReelsV2Transformer3DModel, **small, inject_sample_info=True)
    assert PRESETS["skyreels-v2-1.3b"].geometry.parameters == skyreels


CAUSAL = {"num_frames_per_block": 2, "window_frames": 8, "sink_frames": 2}
SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 2,
    "text_dim": 32,
    "causal": CAUSAL,
}
MLA = {"v_head_dim": 64, "rope_pairs": [[]] * 2, "nope_pairs": [[]] * 2, "position": "rotate_on_read"}


def small_model(kind: str) -> CausalWanTransformer3DModel:
    with torch.device("meta"):
        if kind == "dense":
            return CausalWanTransformer3DModel(**SMALL).to(torch.bfloat16)
        mla = {**MLA, "own_chunk": kind, "kv_lora_rank": [40, 24]}
        return MLAWanTransformer3DModel(**SMALL, mla=mla).to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["dense", "exact"])
def test_from_model_agrees_with_the_cache_that_the_model_allocates(kind: str) -> None:
    model = small_model(kind)
    geometry, rows = from_model(model, 32, 48)
    result = plan(geometry, rows)
    cache = model.init_cache(1, 32, 48, device="meta")
    assert result.latent_cache_bytes == cache.bytes()
    assert result.latent_scalars_per_token == cache.scalars_per_token()
    assert result.dense_cache_bytes == small_model("dense").init_cache(1, 32, 48, device="meta").bytes()
    assert result.dense_scalars_per_token == 512


class PeakBytes(TorchDispatchMode):
    """Bytes of tensors alive at once, counted from the operations of a model on the meta device."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.known:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("kind", ["dense", "exact", "latent"])
def test_working_memory_covers_what_a_chunk_holds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fused kernel holds no logits; the meta device would take the unfused path.
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: query.new_empty((*query.shape[:-1], value.shape[-1])),
    )
    model = small_model(kind).eval()
    height, width, frames = 64, 64, CAUSAL["num_frames_per_block"]
    cache = model.init_cache(1, height, width, device="meta")
    cache.frames_seen = 40
    chunk = torch.empty(1, 16, frames, height, width, device="meta", dtype=torch.bfloat16)
    text = torch.empty(1, 8, 32, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), PeakBytes(model) as counter:
        model.forward_chunk(chunk, torch.empty(1, device="meta"), text, cache)
    geometry, _ = from_model(model, height, width)
    allowed = activation_bytes(geometry, geometry.window_frames, 2)
    print(f"{kind}: counted {counter.peak:,}, allowed {allowed:,}")
    assert counter.peak <= allowed <= 2 * counter.peak


def test_plan_table_shows_the_figures() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan_table(preset_plan("wan2.1-t2v-1.3b")))
    text = console.export_text()
    for expected in ("3,072", "224", "-92.7 %", "6.04 GB", "0.44 GB", "13.7x smaller", "11", "62", "H100 80 GB"):
        assert expected in text


def test_a_cache_that_grows_is_said_to_grow() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan_table(plan(preset("digits").geometry, 384, 96)))
    text = console.export_text()
    assert "+25.0 %" in text and "1.2x larger" in text and "fewer" in text
    assert "--" not in text and "smaller" not in text
