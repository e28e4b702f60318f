"""The results as Markdown, and what of the goals is reached."""

from __future__ import annotations

PUBLISHED, TUNED = "dense, published code", "dense, tuned, absolute"
GOALS = (
    ("published code over the best way at rank 192, model step", PUBLISHED, "latent 192", 1.3),
    ("tuned dense over the best way at rank 192, model step", TUNED, "latent 192", 0.97),
    ("tuned dense over the best way at rank 64, model step", TUNED, "latent 64", 1.3),
)


def goals(result):
    """Every goal with what was measured and whether it is reached; what was not measured is left out."""
    found = []
    for name, base, prefix, wanted in GOALS:
        ratios = ((result.get("step") or {}).get("ratios") or {}).get(base) or {}
        best = max((ratio for way, ratio in ratios.items() if way.startswith(prefix)), default=None)
        if best is not None:
            found.append({"goal": name, "wanted": wanted, "measured": best, "reached": best >= wanted})
    streams = (result.get("streams") or {}).get("streams") or {}
    dense = streams.get(TUNED)
    if dense:
        best = max(count for name, count in streams.items() if name != TUNED) / dense
        found.append({"goal": "streams over dense", "wanted": 6, "measured": best, "reached": best >= 6})
    rows = (result.get("attention") or {}).get("rows") or []
    queries = result["shape"]["chunk"] * result["shape"]["tokens"]
    rates = [
        times["tflop_s"]
        for row in rows
        if row["queries"] == queries
        for name, times in row["times"].items()
        if not name.startswith("expand")
    ]
    if rates:
        share = max(rates) / result["ceilings"]["matmul_tflop_s"]
        name = f"attention's share of the matmul rate at {queries} queries"
        found.append({"goal": name, "wanted": 0.75, "measured": share, "reached": share >= 0.75})
    return found


def table(result):
    """The results as Markdown."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['dtype']}; "
        "medians of interleaved rounds.",
    ]
    if result["tiny"]:
        lines += ["", "A toy size: these times mean nothing."]
    ceilings = result.get("ceilings")
    if ceilings:
        rates = f"Copy {ceilings['copy_tb_s']:.2f} TB/s, matmul {ceilings['matmul_tflop_s']:.4g} TFLOP/s."
        lines += ["", f"{rates} Best stock attention at the step's size: {result.get('stock', {}).get('best')}."]
    if result.get("goals"):
        lines += ["", "| goal | wanted | measured | |", "| --- | ---: | ---: | --- |"]
        for goal in result["goals"]:
            verdict = "reached" if goal["reached"] else "missed"
            lines.append(f"| {goal['goal']} | {goal['wanted']} | {goal['measured']:.3g} | {verdict} |")
    for part, title in (("step", "model step"), ("chunk", "chunk"), ("graph", "one pass")):
        lines += _times(result, part, title)
    streams = result.get("streams") or {}
    if streams.get("streams"):
        lines += ["", "| streams until memory ends | |", "| --- | ---: |"]
        lines += [f"| {name} | {count} |" for name, count in streams["streams"].items()]
    for row in (result.get("attention") or {}).get("rows") or []:
        lines += ["", f"{row['queries']} queries x {row['keys']} keys x batch {row['batch']}:", ""]
        lines += ["| attention | ms | quartiles | TFLOP/s | of matmul |", "| --- | ---: | --- | ---: | ---: |"]
        for name, times in row["times"].items():
            share = times["tflop_s"] / result["ceilings"]["matmul_tflop_s"]
            low, high = times["quartiles_ms"]
            span = f"{low:.3g} to {high:.3g}"
            lines.append(f"| {name} | {times['median_ms']:.3g} | {span} | {times['tflop_s']:.3g} | {share:.0%} |")
        lines += [f"\n{name} does not run here: {reason}" for name, reason in row["refused"].items()]
    for part, found in result.items():
        if isinstance(found, dict) and "failed" in found:
            lines += ["", f"{part} failed: {found['failed']}"]
        if isinstance(found, dict) and found.get("left_out"):
            lines += ["", f"Left out of {part}: {'; '.join(found['left_out'])}"]
    for name, kernels in (result.get("profile") or {}).items():
        if isinstance(kernels, list):
            lines += ["", f"Where a step of {name} spends its time:", "", "| kernel | µs | calls |"]
            lines += ["| --- | ---: | ---: |"]
            lines += [f"| `{kernel['name']}` | {kernel['us']:.0f} | {kernel['calls']} |" for kernel in kernels]
    return "\n".join(lines) + "\n"


def _times(result, part, title):
    found = result.get(part) or {}
    if not found.get("times"):
        return []
    sizes = found.get("cache_bytes") or {}
    lines = ["", f"| {title} | ms | quartiles | rounds | cache |", "| --- | ---: | --- | ---: | ---: |"]
    for name, times in found["times"].items():
        low, high = times["quartiles_ms"]
        size = f"{sizes[name] / 1e9:.3f} GB" if name in sizes else ""
        lines.append(f"| {name} | {times['median_ms']:.4g} | {low:.4g} to {high:.4g} | {times['rounds']} | {size} |")
    if found.get("ratios"):
        names = list(next(iter(found["ratios"].values())))
        lines += ["", f"| {title}: over | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
        for base, ratios in found["ratios"].items():
            lines.append(f"| {base} | {' | '.join(f'{ratios[name]:.3f}x' for name in names)} |")
    lines += [f"\n{name} does not run here: {reason}" for name, reason in (found.get("refused") or {}).items()]
    return lines
