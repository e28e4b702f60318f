"""Time and memory of a conversion at real size: `python docs/benchmarks/convert_size.py`.

Writes random checkpoints of Wan2.1's shapes (bfloat16, sharded), 1.3B and six layers of 14B, and converts each
from disk to disk in a process of its own: from the weights alone (`svd`) and with 4,032 calibration tokens
(`activation`, `metric: velocity`), 1.3B also with one latent for two layers (`shared`). Peaks are over the resident
memory after the imports: all of it (VmHWM, pages of mapped files included) and the anonymous part, sampled every
10 ms. Time is linear in layers, and memory flat, if the last third of the layers takes what the first third does.
Writes `convert_size.json` and `convert_size.md` beside itself and exits 1 if a target is missed. Rows that the
first holds already, measured alike, stay as they are, so a table may take several calls: `--only "1.3b 30"`.
`--layers 3` measures one small cut of each shape instead and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Three clips of 21 frames of 8x8 tokens; with the noisy copies twice as many go through the blocks.
CLIPS, FRAMES, HEIGHT, WIDTH, TEXT_TOKENS = 3, 21, 16, 16, 32
TOKENS = CLIPS * FRAMES * HEIGHT * WIDTH // 4
RANK = 224
SECONDS = {"svd": 240, "activation": 900, "shared": 900}
PEAK_BYTES = {"1.3b": 3e9, "14b": 4e9}
# How much longer the last third of the layers may take than the first, and how much more memory.
LINEAR, FLAT = 1.15, 1.1
RESULT = "result: "


def rows_to_measure(layers: int | None) -> list[dict[str, Any]]:
    cuts = {"1.3b": 30, "14b": 6} if layers is None else {"1.3b": layers, "14b": layers}
    return [
        {"shape": shape, "layers": count, "init": init}
        for shape, count in cuts.items()
        for init in SECONDS
        if init != "shared" or shape == "1.3b"
    ]


def name_of(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['layers']} {row['init']}"


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Watch(threading.Thread):
    """The largest anonymous memory seen, in all and since `lap`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.lap_peak = 0

    def run(self) -> None:
        while True:
            now = status("RssAnon")
            self.peak, self.lap_peak = max(self.peak, now), max(self.lap_peak, now)
            time.sleep(0.01)

    def lap(self) -> int:
        peak, self.lap_peak = self.lap_peak, 0
        return peak


def convert(folder: Path, out: Path, init: str, metric: str) -> dict[str, Any]:
    """One conversion in this process, measured."""
    import torch

    from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_source
    from mla_convert.export.checkpoint import save_checkpoint
    from mla_convert.load import load_source

    causal = {"num_frames_per_block": 3, "window_frames": 21, "sink_frames": 3}
    calibration = {"clips": CLIPS, "batch_size": 1, "max_tokens": TOKENS, "metric": metric}
    together = 2 if init == "shared" else 1
    config = ConvertConfig(
        init="svd" if init == "svd" else "activation",
        layers_per_latent=together,
        kv_lora_rank=together * RANK,
        calibration=calibration,
    )
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[CalibrationBatch]:
        for _ in range(CLIPS):
            latents = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH, generator=generator)
            yield CalibrationBatch(latents, torch.randn(1, TEXT_TOKENS, 4096, generator=generator))

    # Some libraries are imported only when they are used.
    torch.linalg.eigh(torch.eye(4, dtype=torch.float64))
    laps: list[dict[str, Any]] = []
    watch = Watch()
    watch.start()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    start, anonymous = status("VmRSS"), status("RssAnon")
    began = last = time.monotonic()
    began_busy = last_busy = time.process_time()

    def told(what: str, done: int, total: int) -> None:
        nonlocal last, last_busy
        now, busy = time.monotonic(), time.process_time()
        lap = {"what": what, "done": done, "seconds": now - last, "cpu_seconds": busy - last_busy}
        laps.append({**lap, "anonymous_bytes": watch.lap() - anonymous})
        last, last_busy = now, busy

    source = load_source(str(folder), causal=causal)
    converted = convert_source(source, config, out / "parts", batches(), dtype=torch.bfloat16, progress=told)
    fitted, fitted_peak = time.monotonic(), status("VmHWM")
    save_checkpoint(converted.model, out / "checkpoint", {}, max_shard_size="1GB", tensors=converted.tensors)
    ended = time.monotonic()
    files = [path for path in (out / "checkpoint").rglob("*") if path.is_file()]
    return {
        "seconds": ended - began,
        "seconds_writing": ended - fitted,
        "cpu_seconds": time.process_time() - began_busy,
        "start_bytes": start,
        "peak_bytes": status("VmHWM") - start,
        "peak_bytes_converting": fitted_peak - start,
        "peak_anonymous_bytes": watch.peak - anonymous,
        "written_bytes": sum(path.stat().st_size for path in files),
        "shards": sum(path.suffix == ".safetensors" for path in files),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "laps": laps,
    }


def measure(row: dict[str, Any], folder: Path, out: Path, metric: str) -> dict[str, Any]:
    """A row of the table: one conversion in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), str(out), row["init"], "--metric", metric]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(RESULT))
    return {**row, **json.loads(line.removeprefix(RESULT))}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Every target by name, and whether it was met."""
    found: dict[str, bool] = {}
    for row in rows:
        name = f"{row['shape']} {row['layers']} layers {row['init']}"
        if row["shape"] == "1.3b":
            found[f"{name}: at most {SECONDS[row['init']]} s"] = row["seconds"] <= SECONDS[row["init"]]
        limit = PEAK_BYTES[row["shape"]]
        found[f"{name}: peak at most {limit / 1e9:g} GB over start"] = row["peak_bytes"] <= limit
        laps = [lap for lap in row["laps"] if lap["what"] == "convert"]
        if len(laps) >= 6:
            first, last = laps[: len(laps) // 3], laps[-(len(laps) // 3) :]
            longer, larger = (_middle(last, key) / _middle(first, key) for key in ("cpu_seconds", "anonymous_bytes"))
            found[f"{name}: time linear in layers ({longer:.2f})"] = longer <= LINEAR
            found[f"{name}: memory flat ({larger:.2f})"] = larger <= FLAT
    return found


def _middle(laps: list[dict[str, Any]], key: str) -> float:
    return statistics.median(lap[key] for lap in laps)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | layers | init | seconds | CPU seconds | writing | peak over start | anonymous part | written |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = [f"{row[key] / 1e9:.2f} GB" for key in ("peak_bytes", "peak_anonymous_bytes", "written_bytes")]
        times = [f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds", "seconds_writing")]
        lines.append("| " + " | ".join([row["shape"], str(row["layers"]), row["init"], *times, *sizes]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="measure this cut of each shape and write nothing")
    parser.add_argument("--only", default="", help="measure only rows whose 'shape layers init' contains this")
    parser.add_argument("--metric", choices=["output", "velocity"], default="velocity")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written, some 15 GB; default: temporary")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "OUT", "INIT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, out, init = arguments.measure
        print(RESULT + json.dumps(convert(Path(folder), Path(out), init, arguments.metric)))
        return 0

    from wan_shapes import cut_checkpoint, write_checkpoint

    settings = {"rank": RANK, "calibration_tokens": TOKENS, "metric": arguments.metric, "cores": os.cpu_count()}
    path = Path(__file__).with_suffix(".json")
    rows: list[dict[str, Any]] = []
    if arguments.layers is None and path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = stored["rows"] if all(stored[key] == value for key, value in settings.items()) else []
    order = [name_of(row) for row in rows_to_measure(arguments.layers)]
    there = {name_of(row) for row in rows}
    wanted = [row for row in rows_to_measure(arguments.layers) if name_of(row) not in there]
    wanted = [row for row in wanted if arguments.only in name_of(row)]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert-size-") as place:
        for shape in sorted({row["shape"] for row in wanted}):
            most = max(row["layers"] for row in wanted if row["shape"] == shape)
            whole = Path(place) / f"{shape}-whole"
            write_checkpoint(whole, shape, most)
            for row in (row for row in wanted if row["shape"] == shape):
                cut = Path(place) / f"{shape}-{row['layers']}"
                row["parameters"] = cut_checkpoint(whole, cut, row["layers"])
                rows.append(measure(row, cut, Path(place) / "out", arguments.metric))
                shutil.rmtree(cut)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                rows.sort(key=lambda row: order.index(name_of(row)))
                if arguments.layers is None:
                    path.write_text(
                        json.dumps({**settings, "targets": verdicts(rows), "rows": rows}, indent=2) + "\n",
                        encoding="utf-8",
                    )
                    path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
            shutil.rmtree(whole)
    met = verdicts(rows)
    print(table(rows), end="")
    for name, held in met.items():
        print(f"{'met   ' if held else 'MISSED'} {name}")
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
