"""Format the results as Markdown, and evaluate the goals."""

from __future__ import annotations

PUBLISHED = "dense, published code, flash"
PUBLISHED_BEST = "dense, published code, best stock"
TUNED, REINDEXED = "dense, tuned, absolute", "dense, tuned, re-indexed"
PAIRED = "latent 448 of two layers, rotated on read"
"""The conversion that the shipped recipes for published models make."""
SHARED = 32
"""Channels of the shared rotary key in the benchmark, beside the rank."""
KEPT = "latent 192, rotated on read, history kept"
GOALS = (
    (
        "published code with torch's flash attention, as it runs on an H200, over the best way at rank 192, model step",
        PUBLISHED,
        "latent 192",
        1.3,
    ),
    (
        "published code with the fastest stock attention, like FlashAttention-3 on an H100, over the same",
        PUBLISHED_BEST,
        "latent 192",
        1.3,
    ),
    ("tuned dense over the best way at rank 192, model step", TUNED, "latent 192", 0.97),
    ("tuned dense over the best way at rank 64, model step", TUNED, "latent 64", 1.3),
)


def goals(result):
    """Every goal with its measurement and whether it is reached; both are None if nothing was measured."""
    found = []

    def add(name, wanted, measured, least=False):
        """Add a goal. `least` marks `measured` as a lower bound, which cannot be a miss."""
        reached = None if measured is None or wanted is None or (least and measured < wanted) else measured >= wanted
        more = {"least": True} if least else {}
        found.append({"goal": name, "wanted": wanted, "measured": measured, "reached": reached, **more})

    for name, base, prefix, wanted in GOALS:
        ratios = ((result.get("step") or {}).get("ratios") or {}).get(base) or {}
        add(name, wanted, max((ratio for way, ratio in ratios.items() if way.startswith(prefix)), default=None))
    chunk = result.get("chunk") or {}
    for base in (PUBLISHED, PUBLISHED_BEST, TUNED):
        ratio = ((chunk.get("ratios") or {}).get(base) or {}).get(KEPT)
        add(f"for comparison: {base}, over {KEPT} for a chunk of {chunk.get('passes', 'several')} passes", None, ratio)
    count = result.get("streams") or {}
    memory = f" in {count['gb']:.0f} GB" if count.get("gb") else ""
    add(f"streams over dense{memory}", 6, *_streams(count))
    queries, keys = (result["shape"][name] * result["shape"]["tokens"] for name in ("chunk", "window"))
    size = f"at {queries} queries and {keys} keys"
    for name, ours in (("the fastest attention", False), ("the fastest of ours", True)):
        share, path = _share(result, queries, keys, ours)
        title = f"share of the matmul rate of {name} {size}, counted as dense" + (f": {path}" if path else "")
        add(title, 0.75, share)
    return found


def _share(result, queries, keys, ours):
    """Dense attention's operations per time of the fastest path, relative to the matmul rate; and the path.

    Absorbed paths count only if they need at least as many operations as dense attention; with a low rank they would
    appear to exceed what the device can do. Expansion is not included. None if nothing was measured.
    """
    shape, most = result["shape"], (result.get("ceilings") or {}).get("matmul_tflop_s")
    rows = (result.get("attention") or {}).get("rows") or []
    times = {}
    for row in rows:
        if (row["queries"], row["keys"], row["batch"]) == (queries, keys, 1):
            times = {name: found["median_ms"] for name, found in row["times"].items() if _counts(name, shape, ours)}
    if not times or not most:
        return None, None
    path = min(times, key=times.get)
    return 4 * shape["heads"] * queries * keys * shape["head_dim"] / times[path] / 1e9 / most, path


def _counts(name, shape, ours):
    way, _, rank = name.partition(", rank ")
    if rank:
        return way == "absorbed" and 2 * int(rank) + SHARED >= 2 * shape["head_dim"]
    return name.startswith("attend") or not ours


def _streams(found):
    """Most streams of a latent way divided by those of the dense way, and whether this is a lower bound.

    None unless an upper bound of the dense streams is known.
    """
    counts, open_ = found.get("streams") or {}, found.get("open") or {}
    latent = {name: count for name, count in counts.items() if name != TUNED and count is not None}
    dense = counts.get(TUNED)
    if TUNED in open_:
        # The upper bound is one less than the smallest number known not to fit.
        dense = open_[TUNED][1] and open_[TUNED][1] - 1
    if not dense or not latent:
        return None, False
    most = max(latent.values())
    more = any(name == TUNED or high is None or high - 1 > most for name, (_, high) in open_.items())
    return most / dense, more


def table(result):
    """The results as Markdown."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['dtype']}; "
        "medians of interleaved rounds.",
    ]
    if result["tiny"]:
        lines += ["", "A toy size: these times mean nothing."]
    refused = result.get("tiles_refused")
    if refused:
        lines += [
            "",
            f"A check failed with these tiles, so those of the package are used: {'; '.join(refused['tiles'])}",
            "",
        ]
        lines += [f"- {failure}" for failure in refused["failures"]]
    if result.get("tiles"):
        lines += ["", f"Tiles that differ from the package's: {'; '.join(result['tiles'])}"]
    failures = (result.get("checks") or {}).get("failures")
    if failures:
        lines += ["", "These checks failed, so nothing that runs their ops is timed:", ""]
        lines += [f"- {failure}" for failure in failures]
    ceilings, stock = result.get("ceilings") or {}, result.get("stock") or result.get("unsplit") or {}
    if "matmul_tflop_s" in ceilings:
        rates = f"Copy {ceilings['copy_tb_s']:.2f} TB/s, matmul {ceilings['matmul_tflop_s']:.4g} TFLOP/s."
        runs = f"Best stock attention at the step's size: {stock.get('best')}; torch's own uses"
        lines += ["", f"{rates} {runs} {stock.get('torch_runs')}; cuDNN {result.get('cudnn')}."]
    if result.get("goals"):
        lines += ["", "| goal | wanted | measured | |", "| --- | ---: | ---: | --- |"]
        for goal in result["goals"]:
            verdict = {True: "reached", False: "missed", None: ""}[goal["reached"]]
            measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
            measured = "at least " * bool(goal.get("least")) + measured
            wanted = "" if goal["wanted"] is None else goal["wanted"]
            lines.append(f"| {goal['goal']} | {wanted} | {measured} | {verdict} |")
    titles = {"step": "model step", "dense": "model step, no kernel of ours", "chunk": "chunk", "graph": "one pass"}
    for part, title in titles.items():
        lines += _times(result, part, title)
    streams = result.get("streams") or {}
    if streams.get("streams"):
        memory = f"{streams['gb']:.0f} GB are full" if streams.get("gb") else "memory runs out"
        lines += ["", f"| streams until {memory} | |", "| --- | ---: |"]
        counts = {name: "not measured" if count is None else count for name, count in streams["streams"].items()}
        lines += [
            f"| {name} | {'at least ' * (name in streams.get('open', {}) and count != 'not measured')}{count} |"
            for name, count in counts.items()
        ]
    for part in ("attention", "flex"):
        for row in (result.get(part) or {}).get("rows") or []:
            lines += _row(row, ceilings.get("matmul_tflop_s"))
    for part, found in result.items():
        if isinstance(found, dict) and "failed" in found:
            lines += ["", f"{part} failed: {found['failed']}"]
        if isinstance(found, dict) and found.get("left_out"):
            lines += ["", f"Left out of {part}: {'; '.join(found['left_out'])}"]
    if running := result.get("running"):
        lines += ["", f"Not finished: these are the results up to {running['part']}."]
    for one in result.get("lost") or []:
        lines += ["", f"A process ended in {one['part']}, {one['name'] or 'at an unknown call'}: {one['why']}"]
    seconds = result.get("seconds") or {}
    lines += ["", f"Seconds: {', '.join(f'{part} {spent:.0f}' for part, spent in seconds.items())}."]
    for name, kernels in (result.get("profile") or {}).items():
        if isinstance(kernels, list):
            lines += ["", f"Where a step of {name} spends its time:", "", "| kernel | µs | calls |"]
            lines += ["| --- | ---: | ---: |"]
            lines += [f"| `{kernel['name']}` | {kernel['us']:.0f} | {kernel['calls']} |" for kernel in kernels]
    return "\n".join(lines) + "\n"


def _row(row, ceiling):
    """The table of attention at one size."""
    size = f"{row['queries']} queries x {row['keys']} keys x batch {row['batch']}"
    lines = ["", f"{size}, torch uses {row['torch_runs']}:", ""]
    lines += ["| attention | ms | quartiles | launched, ms | TFLOP/s | of matmul |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: |"]
    for name, times in row["times"].items():
        share = f"{times['tflop_s'] / ceiling:.0%}" if ceiling else ""
        low, high = times["quartiles_ms"]
        launched = times.get("launched_ms", times["median_ms"])
        lines.append(
            f"| {name} | {times['median_ms']:.3g} | {low:.3g} to {high:.3g} | {launched:.3g} "
            f"| {times['tflop_s']:.3g} | {share} |"
        )
    odd = {name: times["not_captured"] for name, times in row["times"].items() if "not_captured" in times}
    lines += [f"\n{name} cannot be captured, so its launches are timed: {reason}" for name, reason in odd.items()]
    # Variants that were found wrong are listed as refused below.
    lines += _checked({name: one for name, one in (row.get("checked") or {}).items() if name in row["times"]})
    return lines + [f"\n{name} is not timed: {reason}" for name, reason in row["refused"].items()]


def _checked(found):
    """A line on what was compared at full size; nothing if nothing was."""
    compared = {name: one for name, one in found.items() if one}
    if not compared:
        return []
    worst = max(compared, key=lambda name: compared[name]["error"])
    unequal = [name for name, one in compared.items() if not one["equal"]]
    runs = f"two runs differ for {', '.join(unequal)}" if unequal else "two runs are equal to the bit"
    error = f"the largest difference is {compared[worst]['error']:.1e} of the largest output ({worst})"
    return [f"\n{len(compared)} compared at full size: {error}; {runs}."]


def _times(result, part, title):
    found = result.get(part) or {}
    refused = [f"\n{title}: {name} is not timed: {reason}" for name, reason in (found.get("refused") or {}).items()]
    if not found.get("times"):
        return refused
    sizes = found.get("cache_bytes") or {}
    attends = found.get("attends") or {}
    lines = ["", f"| {title} | ms | quartiles | rounds | cache | attends by |"]
    lines += ["| --- | ---: | --- | ---: | ---: | --- |"]
    for name, times in found["times"].items():
        low, high = times["quartiles_ms"]
        size = f"{sizes[name] / 1e9:.3f} GB" if name in sizes else ""
        span, runs = f"{low:.4g} to {high:.4g}", attends.get(name, "")
        lines.append(f"| {name} | {times['median_ms']:.4g} | {span} | {times['rounds']} | {size} | {runs} |")
    if found.get("ratios"):
        names = list(next(iter(found["ratios"].values())))
        lines += ["", f"| {title}: over | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
        for base, ratios in found["ratios"].items():
            lines.append(f"| {base} | {' | '.join(f'{ratios[name]:.3f}x' for name in names)} |")
    for compare in ("way_agrees", "writes_agree"):
        lines += _checked({name: one.get(compare) for name, one in (found.get("checked") or {}).items()})
    return lines + refused
