"""Every family at its published shapes, from a checkpoint to a chunk of video: `python docs/benchmarks/families.py`.

Writes random checkpoints (bfloat16, sharded) of the 1.3B shapes whole and of the 14B shapes cut to six
layers. Each is converted from disk to disk with 224 scalars a token from the weights alone, saved,
loaded again with `from_pretrained`, and streams the first chunk of a 480x832 video (544x960 for SkyReels):
one denoising pass and the pass that writes the cache. One process a row. Memory is the peak of the
resident memory over what it was after the imports. Writes `families.json` and `families.md` beside itself;
`--only TEXT` measures the rows whose name contains it and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROWS = [
    ("1.3b", 30),
    ("anyflow-far-1.3b", 30),
    ("skyreels-v2-1.3b", 30),
    ("14b", 6),
    ("anyflow-far-14b", 6),
    ("skyreels-v2-14b", 6),
]
RANK, TEXT_TOKENS, TEXT_DIM = 224, 512, 4096
RESULT = "result: "


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(folder: Path, out: Path, shape: str) -> dict[str, Any]:
    """One row in this process."""
    import torch

    from mla_convert.convert import ConvertConfig, convert_source
    from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
    from mla_convert.load import load_source

    skyreels = shape.startswith("skyreels")
    causal = {"num_frames_per_block": 5 if skyreels else 3, "window_frames": 25 if skyreels else 21}
    # The published chunks of AnyFlow are its own.
    chosen = None if shape.startswith("anyflow") else causal
    height, width = (68, 120) if skyreels else (60, 104)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}

    @contextmanager
    def lap(name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        began, before = time.monotonic(), start
        yield
        found[name] = {"seconds": time.monotonic() - began, "peak_bytes": status("VmHWM") - before}

    start = status("VmRSS")
    with lap("convert"):
        source = load_source(str(folder), causal=chosen)
        config = ConvertConfig(init="svd", kv_lora_rank=RANK, position="rotate_on_read")
        converted = convert_source(source, config, out / "parts", dtype=torch.bfloat16)
    with lap("save"):
        save_checkpoint(converted.model, out / "checkpoint", {}, max_shard_size="1GB", tensors=converted.tensors)
    del converted
    with lap("load"), torch.no_grad():
        model = load_checkpoint(out / "checkpoint")
    frames = model.causal.chunks(model.causal.window_frames)[0][1]
    chunk = torch.randn(1, 16, frames, height, width, dtype=torch.bfloat16)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, dtype=torch.bfloat16)
    with lap("stream"), torch.no_grad():
        cache = model.init_cache(1, height, width)
        velocity = model.forward_chunk(chunk, torch.full((1, frames), 500.0), text, cache)
        model.forward_chunk(chunk, torch.zeros(1, frames), text, cache, write=True)
    assert torch.isfinite(velocity).all()
    tokens = model.token_grid(height, width)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "class": type(model).__name__,
        "chunk_tokens": frames * tokens[0] * tokens[1],
        "cache_bytes": cache.bytes(),
        "dense_cache_bytes": cache.bytes() // RANK * source.geometry.dense_scalars_per_token,
        **found,
    }


def table(rows: list[dict[str, Any]]) -> str:
    steps = ("convert", "save", "load", "stream")
    lines = [
        "| shapes | layers | " + " | ".join(steps) + " | tokens of the chunk | peak converting | peak streaming "
        "| cache of a window | dense |",
        "| --- | ---: |" + " ---: |" * (len(steps) + 5),
    ]
    for row in rows:
        times = [f"{row[step]['seconds']:.0f} s" for step in steps]
        peaks = [f"{row[step]['peak_bytes'] / 1e9:.2f} GB" for step in ("convert", "stream")]
        sizes = [f"{row[key] / 1e9:.2f} GB" for key in ("cache_bytes", "dense_cache_bytes")]
        cells = [row["shape"], str(row["layers"]), *times, str(row["chunk_tokens"]), *peaks, *sizes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose shapes contain this; writes nothing")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "OUT", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, out, shape = arguments.measure
        print(RESULT + json.dumps(measure(Path(folder), Path(out), shape)))
        return 0

    from wan_shapes import write_checkpoint

    rows = []
    for shape, layers in ROWS:
        if arguments.only not in shape:
            continue
        with tempfile.TemporaryDirectory(prefix="families-") as place:
            folder = Path(place) / "source"
            write_checkpoint(folder, shape, layers)
            command = [sys.executable, __file__, "--measure", str(folder), str(Path(place) / "out"), shape]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(RESULT))
        rows.append({"shape": shape, "layers": layers, **json.loads(line.removeprefix(RESULT))})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if not arguments.only:
        here = Path(__file__)
        result = {"rank": RANK, "cores": os.cpu_count(), "rows": rows}
        here.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        here.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
