"""Write the entry of a device in the table that chooses kernels: `python device_costs.py results/results.json`.

An entry holds the cost of a multiply-add on each path relative to torch's own attention with the most queries. It comes
from the benchmark's attention part at a full window and batch 1, with what the model runs: torch's choice, and `attend`
with splits chosen by its rule. It covers device time, not launches from Python. The entry goes into
`mla_convert/mla/device_costs.json`, or into `--table`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "mla_convert" / "mla" / "device_costs.json"
RANK = 192
WAYS = {"sdpa": "torch", "attend": "attend, splits by rule", "absorbed": f"absorbed, rank {RANK}"}
EXPAND = f"expand, rank {RANK}"


def entry(result):
    """The table entry for a result. Raises ValueError if a size or a path was not measured."""
    window = result["shape"]["window"] * result["shape"]["tokens"]
    rows = {row["queries"]: row for row in result["attention"]["rows"] if row["batch"] == 1 and row["keys"] == window}
    if not rows:
        raise ValueError(f"attention to {window} keys at batch 1 was not measured")
    queries = sorted(rows)

    def seconds_per_flop(name, count):
        if name not in rows[count]["times"]:
            raise ValueError(f"{name} was not measured at {count} queries")
        return 1 / rows[count]["times"][name]["tflop_s"]

    unit = seconds_per_flop(WAYS["sdpa"], queries[-1])
    # Expansion does not depend on the queries and is timed once for these keys.
    expanded = next((count for count in reversed(queries) if EXPAND in rows[count]["times"]), queries[-1])
    return {
        "source": f"kernels/mla-attention/benchmarks/run.py, torch {result['torch']}, triton {result['triton']}",
        "queries": queries,
        "attention": {
            way: [round(seconds_per_flop(name, count) / unit, 4) for count in queries] for way, name in WAYS.items()
        },
        "expand": round(seconds_per_flop(EXPAND, expanded) / unit, 4),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE)
    chosen = parser.parse_args(arguments)
    result = json.loads(chosen.result.read_text(encoding="utf-8"))
    if result["tiny"] or result["device"].startswith("CPU"):
        parser.exit(1, "error: results of a toy size or of a CPU say nothing about a GPU; pass those of a full run\n")
    try:
        found = entry(result)
    except (KeyError, ValueError) as error:
        parser.exit(1, f"error: {chosen.result} is incomplete: {error}\n")
    table = json.loads(chosen.table.read_text(encoding="utf-8"))
    table[result["device"]] = found
    chosen.table.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"{result['device']}: {json.dumps(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
