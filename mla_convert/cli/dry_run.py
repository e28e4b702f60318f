"""`distill --dry-run`: prints the memory, steps and tokens that training needs, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..errors import UsageError
from ..sizes import GPU_GIGABYTES, duration, format_bytes
from .output import print_result, stderr

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


def print_needs(recipe: Recipe, launch: Path | None, processes: int, measure: int, as_json: bool) -> None:
    """Print what each stage of a recipe needs. Raises UsageError for a recipe with several experts."""
    if recipe.experts is not None:
        raise UsageError(f"recipe {recipe.name} trains several models; choose --expert {' or '.join(recipe.experts)}")
    with stderr().status("counting" if measure == 0 else f"counting, then timing {measure} steps per stage"):
        from ..pipeline.dry_run import dry_run, read_launch

        result = dry_run(recipe, read_launch(launch, processes), measure)
    print_result(as_json, result, needs_table(result))


def needs_table(result: dict[str, Any]) -> Table:
    """Tabulate a dry run, one column per stage; bytes are per GPU."""
    launch = result["launch"]
    strategy = "DDP" if launch["processes"] > 1 else "one process"
    strategy = "FSDP2" if launch["sharded"] else "DeepSpeed ZeRO-2" if launch["zero"] else strategy
    notes = [_verdict(result["memory_bytes"]), *result["assumptions"], "1 GB reserved per GPU; 1 GB = 10^9 bytes"]
    table = Table(
        title=f"{result['recipe']}: {launch['processes']} x GPU, {strategy}",
        caption="\n".join(notes),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("")
    stages = result["stages"]
    for stage in stages:
        table.add_column(stage["stage"], justify="right")
    for key in ("parameters", "trained", "steps", "clips", "tokens"):
        table.add_row(key, *(f"{stage[key]:,}" for stage in stages))
    table.add_section()
    for cause in stages[0]["memory"]:
        sizes = [stage["memory"][cause] for stage in stages]
        if any(sizes):
            label = {"parameters": "weights"}.get(cause, cause.replace("_", " "))
            table.add_row(label, *(format_bytes(size) if size else "-" for size in sizes))
    table.add_row("memory per GPU", *(format_bytes(stage["memory_bytes"]) for stage in stages))
    if any(stage["host_bytes"] for stage in stages):
        table.add_row("host memory, first process", *(format_bytes(stage["host_bytes"]) for stage in stages))
    table.add_row("disk", *(format_bytes(stage["disk_bytes"]) for stage in stages))
    if result["seconds"] is not None:
        table.add_row("seconds per step, here", *(f"{stage['seconds_per_step']:.3g}" for stage in stages))
        table.add_row("time, here", *(duration(stage["seconds"]) for stage in stages))
    return table


def _verdict(needed: int) -> str:
    """Say which GPUs that `plan` knows hold the largest stage, which needs so many bytes of each."""
    named: dict[int, list[str]] = {}
    for name, size in sorted(GPU_GIGABYTES.items(), key=lambda item: item[1]):
        named.setdefault(size, []).append(name)
    shown = {size: f"{size} GB ({', '.join(names)})" for size, names in named.items()}
    enough = [size for size in shown if size * 10**9 >= needed]
    less = [size for size in shown if size * 10**9 < needed]
    if not enough:
        return f"by this count {shown[less[-1]]} per GPU is not enough"
    return f"by this count {shown[enough[0]]} per GPU is enough" + (f", {shown[less[-1]]} is not" if less else "")
