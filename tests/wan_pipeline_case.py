"""A pipeline of tiny random parts as Wan models are published with: tokenizer, text encoder and VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

DIM = 32
"""Numbers per token of the text encoder."""
STATISTICS = {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 1.5]}
"""Those of the VAE, whose latents have 4 channels; no two channels agree."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = [f"▁{word}" for word in ("a", "red", "square", "moves", "over", "the", "dark")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((word, -2.0) for word in words)]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, *((c, -5.0) for c in "▁&abdehmoqrstuv")], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def wan_parts() -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel, AutoencoderKLWan]:
    """Tokenizer, text encoder and VAE, the same at every call."""
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=25, d_model=DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], **STATISTICS)
    return tiny_tokenizer(), encoder, vae


def write_wan_pipeline(folder: Path) -> Path:
    """The pipeline in `folder`, without a transformer."""
    WanPipeline(*wan_parts(), None).save_pretrained(folder)
    return folder
