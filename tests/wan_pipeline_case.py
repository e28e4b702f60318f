"""A pipeline of tiny random parts as Wan models are published with: tokenizer, text encoder and VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from test_encode import DIM, tiny_tokenizer
from transformers import UMT5Config, UMT5EncoderModel


def write_wan_pipeline(folder: Path) -> Path:
    """The pipeline in `folder`, without a transformer; its latents have 4 channels."""
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=25, d_model=DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    WanPipeline(tiny_tokenizer(), encoder, vae, None).save_pretrained(folder)
    return folder
