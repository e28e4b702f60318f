"""python docs/benchmarks/attention_cpu.py [--tokens-per-frame 390] [--repeats 5]

One layer's attention to a full window on a CPU, dense and latent in turn, at the geometry of Wan2.1-1.3B with a
quarter of its tokens a frame; writes attention_cpu.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch

from mla_convert.evaluate.bench import DENSE, LATENT, ROTATED, BenchConfig, bench
from mla_convert.files import write_json, write_text
from mla_convert.pipeline.planning import bench_settings

HERE = Path(__file__).parent
CASES = (
    {"position": "rotate_on_read", "kv_lora_rank": 224},
    {"position": "decoupled", "kv_lora_rank": 192, "qk_rope_head_dim": 32},
)


def processor() -> str:
    """The name of the processor, where the system tells it."""
    found = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    return found[0].partition(": ")[2] if found else platform.processor()


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    first = results[0]
    threads = first["device"].partition(", ")[2]
    threads = "one thread" if threads == "1 thread" else threads
    lines = [
        f"{processor()}, {threads}, torch {first['torch']}, {first['dtype']}; "
        f"{first['queries']:,} queries, {first['keys']:,} keys; medians of {first['repeats']} interleaved passes, "
        "with their range.",
        "",
        "| layout | latent + shared key | latent, ms | dense, ms | over dense | over dense, rotated keys | cache |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        times = result["attention"]
        shown = [
            f"{times[name]['median_ms']:.0f} ({times[name]['min_ms']:.0f} to {times[name]['max_ms']:.0f})"
            for name in (LATENT, DENSE)
        ]
        over = [times[LATENT]["median_ms"] / times[name]["median_ms"] for name in (DENSE, ROTATED)]
        sizes = f"{result['kv_lora_rank']} + {result['qk_rope_head_dim']}"
        lines.append(
            f"| `{result['position']}` | {sizes} | {' | '.join(shown)} | {over[0]:.2f}x | {over[1]:.2f}x | "
            f"1/{result['ratio_cache']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens-per-frame", type=int, default=390)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    geometry, _ = bench_settings(None, "wan2.1-t2v-1.3b")
    geometry = geometry.model_copy(update={"tokens_per_frame": chosen.tokens_per_frame})
    results = []
    for case in CASES:
        torch.manual_seed(0)
        results.append(bench(geometry, BenchConfig(**case, device="cpu", repeats=chosen.repeats)))
        write_json(HERE / "attention_cpu.json", {"processor": processor(), "results": results})
        write_text(HERE / "attention_cpu.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
