"""python docs/benchmarks/vae_memory.py

What decoding a rollout chunk by chunk holds, and encoding a source, counted without weights on the meta device for the
published VAEs; writes vae_memory.json and .md beside this file. What cuDNN asks for itself and the weights are not in
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from mla_convert.files import write_json, write_text
from mla_convert.run.decode_memory import decoding_bytes, encoding_bytes

HERE = Path(__file__).parent
# The configurations in `vae/config.json` of Wan2.1-T2V-1.3B-Diffusers and Wan2.2-TI2V-5B-Diffusers.
WAN22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
VAES: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "Wan2.1": ({}, ((480, 832), (720, 1280))),
    "Wan2.2-TI2V-5B": (WAN22, ((704, 1280),)),
}
STREAMS = 4


def counted() -> list[dict[str, Any]]:
    """Bytes of every VAE, size and dtype."""
    found = []
    for name, (config, sizes) in VAES.items():
        with torch.device("meta"):
            vae: Any = AutoencoderKLWan(**config)
        down = vae.config.scale_factor_spatial
        for height, width in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                nn.Module.to(vae, dtype)
                bytes_ = decoding_bytes(vae, height // down, width // down)
                size = {"vae": name, "height": height, "width": width, "dtype": str(dtype).removeprefix("torch.")}
                source = encoding_bytes(vae, height // down, width // down)
                found.append({**size, **bytes_._asdict(), "source": source._asdict()})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        f"| VAE | size | dtype | kept a stream | working | one stream | {STREAMS} streams |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        kept, working = row["kept"], row["working"]
        shown = [f"{value / 1e9:.2f} GB" for value in (kept, working, kept + working, STREAMS * kept + working)]
        lines.append(f"| {row['vae']} | {row['height']}x{row['width']} | {row['dtype']} | {' | '.join(shown)} |")
    lines += [
        "",
        "| VAE | size | dtype | kept of a source | working |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in found:
        shown = [f"{row['source'][key] / 1e9:.2f} GB" for key in ("kept", "working")]
        lines.append(f"| {row['vae']} | {row['height']}x{row['width']} | {row['dtype']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = counted()
    write_json(HERE / "vae_memory.json", found)
    write_text(HERE / "vae_memory.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
