"""What users of diffusers do with a pipeline: save it and load it in their way, share its parts, add a LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla_convert import StreamingMLAPipeline
from mla_convert.errors import UsageError
from mla_convert.run.loading import load_arguments

TEXT = pico.inputs(1, 1, 4, 4)[2]
CALL = {"num_frames": 9, "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}


@pytest.fixture(scope="module")
def model() -> Any:
    return pico.convert(pico.dense_model(layers=1), position="rotate_on_read", kv_lora_rank=20)


@pytest.fixture(scope="module")
def pipe(model: Any) -> Any:
    made = StreamingMLAPipeline(model, sampling={"shift": 5.0}, streaming={"cache": "int8"})
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**{"prompt_embeds": TEXT, "guidance_scale": 1.0, **CALL, **changes}).frames


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_saved_pipeline_takes_the_arguments_of_diffusers(
    pipe: Any, tmp_path: Path, variant: str | None, shards: dict[str, str]
) -> None:
    pipe.save_pretrained(tmp_path, variant=variant, **shards)
    settings = {"low_cpu_mem_usage": True, "use_safetensors": True, "device_map": "cpu"}
    again = StreamingMLAPipeline.from_pretrained(tmp_path, variant=variant, **settings)
    state = pipe.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.transformer.state_dict().items())
    assert again.config.sampling == {"shift": 5.0}


def test_a_saved_pipeline_may_be_quantized(pipe: Any, tmp_path: Path) -> None:
    """Its numbers in 8 bits say nothing of the dtype of the others, and diffusers reads them."""
    pipe.save_pretrained(tmp_path)
    config, weights = (
        tmp_path / "transformer" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "quanto"}}))
    state = {name: value.bfloat16() for name, value in load_file(weights).items()}
    save_file({**state, **{f"{name}.int8": value.to(torch.int8) for name, value in state.items()}}, weights)
    folder, arguments = load_arguments(tmp_path, {})
    assert folder == tmp_path and arguments["dtype"]["transformer"] == torch.bfloat16


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_stored_dtype_can_be_asked_for(pipe: Any, tmp_path: Path, name: str) -> None:
    StreamingMLAPipeline(copy.deepcopy(pipe.transformer).bfloat16()).save_pretrained(tmp_path)
    assert StreamingMLAPipeline.from_pretrained(tmp_path, **{name: "auto"}).transformer.dtype == torch.bfloat16


def test_pipelines_share_parts_and_settings(model: Any) -> None:
    vae = AutoencoderKLWan(base_dim=3, z_dim=2, dim_mult=[1] * 4, latents_mean=[0.0] * 2, latents_std=[1.0] * 2)
    first = StreamingMLAPipeline(model, vae=vae.bfloat16(), sampling={"shift": 5.0})
    second = StreamingMLAPipeline.from_pipe(first)
    assert (second.transformer, second.vae, second.config.sampling) == (model, vae, {"shift": 5.0})
    assert vae.dtype == torch.bfloat16 and StreamingMLAPipeline.from_pipe(first, vae=None).vae is None
    stock = WanPipeline(None, None, vae, UniPCMultistepScheduler(), transformer=model)
    assert StreamingMLAPipeline.from_pipe(stock).vae is vae
    stock.register_modules(transformer_2=model)
    with pytest.raises(UsageError, match="has one transformer, not WanPipeline's two"):
        StreamingMLAPipeline.from_pipe(stock)
    with pytest.raises(UsageError, match=r"from_pipe takes no torch_dtype: .* use \.to"):
        StreamingMLAPipeline.from_pipe(first, torch_dtype=torch.bfloat16)


def test_a_lora_is_loaded_weighted_fused_and_unloaded(pipe: Any, tmp_path: Path) -> None:
    dense = pico.dense_model(layers=1)
    dense.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q", "ffn.net.0.proj"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(dense))
    mine = StreamingMLAPipeline(copy.deepcopy(pipe.transformer), sampling={"shift": 5.0})
    mine.set_progress_bar_config(disable=True)
    without = latents(mine)
    mine.load_lora_weights(tmp_path, adapter_name="style")
    whole = latents(mine)
    assert mine.get_list_adapters() == {"transformer": ["style"]} and pico.relative_error(whole, without) > 1e-2
    mine.set_adapters(["style"], [0.0])
    assert pico.relative_error(latents(mine), without) < 1e-5
    mine.set_adapters(["style"], [1.0])
    mine.fuse_lora()
    mine.unload_lora_weights()
    assert pico.relative_error(latents(mine), whole) < 1e-4


REFUSED = [
    ({"seed": 3, "generator": torch.Generator()}, "give seed or generator, not both"),
    ({"denoising_steps": [1000, 500]}, "give num_inference_steps or denoising_steps, not both"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1"),
    ({"guidance_scale": 3.0, "negative_prompt_embeds": TEXT[:, :2]}, r"shape \[1, 2, 8\], which does not fit"),
    ({"guidance_scale": 3.0, "negative_prompt_embeds": TEXT.repeat(2, 1, 1)}, r"\[2, 3, 8\], which does not fit"),
    (
        {"guidance_scale": 3.0, "negative_prompt_embeds": TEXT[..., :4]},
        r"negative_prompt_embeds have shape \[1, 3, 4\]",
    ),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_arguments_that_do_not_fit_are_refused_at_the_call(pipe: Any, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        pipe.stream(**{"prompt_embeds": TEXT, "guidance_scale": 1.0, **CALL, **settings})


def test_embeddings_to_lead_away_from_are_not_read_without_guidance(pipe: Any) -> None:
    assert torch.equal(latents(pipe, negative_prompt_embeds=TEXT[:, :2]), latents(pipe))


def test_a_prompt_may_have_several_videos(pipe: Any) -> None:
    texts, away = torch.cat([TEXT, -TEXT]), torch.cat([0 * TEXT, TEXT])
    guided = {"guidance_scale": 3.0, "seed": [1, 2, 3, 4]}
    made = latents(pipe, prompt_embeds=texts, negative_prompt_embeds=away, num_videos_per_prompt=2, **guided)
    order = [0, 0, 1, 1]
    assert torch.equal(made, latents(pipe, prompt_embeds=texts[order], negative_prompt_embeds=away[order], **guided))
