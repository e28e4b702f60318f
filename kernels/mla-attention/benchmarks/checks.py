"""Every op against its float64 reference, and against what plain torch loses at the same dtype."""

from __future__ import annotations

import functools

import mla_attention as ops
import torch

FACTOR = 1.2
"""An op's relative error may be this many times that of torch at the same dtype."""
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Two units in the last place: below this an error is the rounding of the result itself."""


def relative_error(actual, expected):
    """Largest difference over the largest magnitude; inf where something is not finite."""
    difference = (actual.double() - expected.double()).abs()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max() / expected.abs().max().clamp_min(1e-30))


def listed(found):
    """A tensor as a list of one."""
    return [found] if isinstance(found, torch.Tensor) else found


SIZES = ((10, 40, 3, 64, 96), (25, 40, 3, 64, 96))
"""Tokens a frame, queries, heads, channels a head and rank: less than a block of keys, and some blocks."""
MEASURED = tuple((150, 100, 12, 128, rank) for rank in (192, 64, 448))
"""More of them, in the tiles that are timed: many queries, and several blocks of any size, the last not full."""


def red(failures):
    """The names of the ops that some lines of `check_all` are about."""
    return {line.partition(",")[0] for line in failures}


def check_all(device, dtype, seed=0):
    """A line for every check that an op fails, its name first: both errors, or why it does not run; empty is a pass.

    The interpreter is too slow for MEASURED.
    """
    sizes = SIZES + MEASURED if device.type == "cuda" else SIZES
    return [line for size in sizes for line in check(device, dtype, seed, *size)]


def check(device, dtype, seed, tokens, queries, heads, depth, rank):
    """`check_all` at one size."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    failures = []

    def compare(names, run, exact, plain):
        where = f"{keys} keys, rank {rank}"
        try:
            actual = run()
        except Exception as error:
            failures.append(f"{names[0]}, {where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return
        for name, found, reference, usual in zip(names, *map(listed, (actual, exact, plain)), strict=True):
            error, allowed = relative_error(found, reference), relative_error(usual, reference)
            allowed = max(FACTOR * allowed, FLOOR[dtype])
            if not error <= allowed:
                failures.append(f"{name}, {where}: error {error:.2e}, allowed {allowed:.2e}")

    batch, frames, shared = 2, 3, 32
    keys, scale = frames * tokens, depth**-0.5
    query, key, value = (
        random(batch, queries, heads, depth),
        random(batch, keys, heads, depth),
        random(batch, keys, heads, depth),
    )
    wide = [x.double() for x in (query, key, value)]
    exact = ops.attend_reference(*wide, None, scale)[0]
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    for splits in (1, 2, 5):
        run = functools.partial(ops.attend, query, key, value, None, scale, splits)
        compare([f"attend, {splits} splits"], lambda run=run: run()[0], exact, plain.transpose(1, 2))

    rows = random(batch, frames + 1, tokens, rank + shared)
    rows[:, 1] = float("nan")
    slots = torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
    count = torch.full((1,), keys, dtype=torch.int32, device=device)
    angle = torch.rand(keys, shared // 2, device=device, generator=generator)
    turn = torch.stack([angle.cos(), angle.sin()], dim=-1)
    latent, pe = random(batch, queries, heads, rank), random(batch, queries, heads, shared)
    exact, _ = ops.latent_attention_reference(
        latent.double(), pe.double(), rows.double(), None, slots, count, turn.double(), scale
    )
    plain, _ = ops.latent_attention_reference(latent, pe, rows, None, slots, count, turn, scale)
    for splits in (1, 3):
        run = functools.partial(ops.latent_attention, latent, pe, rows, None, slots, count, turn, scale, splits)
        compare([f"latent_attention, {splits} splits"], lambda run=run: run()[0], exact, plain)

    shape = (batch, keys, heads, depth)
    angle = torch.rand(keys, depth // 2, device=device, generator=generator)
    every = torch.stack([angle.cos(), angle.sin()], dim=-1)
    for rotate_heads in (False, True):
        nope = depth if rotate_heads else depth - shared
        up, bias = random(heads * (nope + depth), rank), random(heads * (nope + depth))
        # Without a shared key a row is the latent alone, and all channels of a head are rotated.
        cached, turned = (rows[..., :rank].contiguous(), every) if rotate_heads else (rows, turn)

        def expanded(kind, function, weights=(up, bias), cached=cached, turned=turned, rotate_heads=rotate_heads):
            out = [torch.zeros(shape, device=device, dtype=kind) for _ in range(2)]
            weights = [x.to(kind) for x in weights]
            turned = turned.to(torch.float64 if kind == torch.float64 else torch.float32)
            function(*out, cached.to(kind), None, slots, count, *weights, None, None, turned, rotate_heads)
            return out

        how = ", heads rotated" * rotate_heads
        compare(
            [f"expand_kv_, keys{how}", f"expand_kv_, values{how}"],
            functools.partial(expanded, dtype, ops.expand_kv_),
            expanded(torch.float64, ops.expand_kv_reference),
            expanded(dtype, ops.expand_kv_reference),
        )

    gain, hidden = random(heads * depth), random(batch, queries, heads * depth)
    angle = torch.rand(queries, depth // 2, device=device, generator=generator)
    turned = torch.stack([angle.cos(), angle.sin()], dim=-1)
    exact = ops.qk_norm_rope_reference(hidden.double(), gain.double(), 1e-6, turned.double(), heads)
    plain = ops.qk_norm_rope_reference(hidden, gain, 1e-6, turned, heads)
    compare(["qk_norm_rope"], functools.partial(ops.qk_norm_rope, hidden, gain, 1e-6, turned, heads), exact, plain)

    coefficients, pairs = random(heads, shared // 2, 2), torch.arange(depth // 2, device=device)
    split = (pairs[shared // 2 :], pairs[: shared // 2], heads)
    exact = ops.split_query_reference(
        hidden.double(), gain.double(), 1e-6, turned.double(), coefficients.double(), *split
    )
    plain = ops.split_query_reference(hidden, gain, 1e-6, turned, coefficients, *split)
    run = functools.partial(ops.split_query, hidden, gain, 1e-6, turned, coefficients, *split)
    compare(["split_query, unrotated", "split_query, rotated"], run, exact, plain)

    parts = [(random(batch, queries, heads, depth), random(batch, heads, queries).float()) for _ in range(2)]
    (a, log_a), (b, log_b) = parts
    exact = ops.merge_pair_reference(a.double(), log_a, b.double(), log_b)[0]
    plain = ops.merge_pair_reference(a, log_a, b, log_b)[0]
    compare(["merge_pair"], lambda: ops.merge_pair(a, log_a, b, log_b)[0], exact, plain)

    own = torch.tensor([1, 3], dtype=torch.int32, device=device)
    down, down_bias = random(rank, 2 * heads * depth) / (2 * heads * depth) ** 0.5, random(rank)
    project, project_bias = random(shared, heads * depth) / (heads * depth) ** 0.5, random(shared)
    new_key, new_value = random(batch, 2 * tokens, heads * depth), random(batch, 2 * tokens, heads * depth)

    def written(kind, function):
        target = torch.zeros(batch, frames + 1, tokens, rank + shared, device=device, dtype=kind)
        weights = [x.to(kind) for x in (new_key, new_value, gain)]
        function(
            target,
            None,
            own,
            *weights,
            1e-6,
            None,
            down.to(kind),
            down_bias.to(kind),
            project.to(kind),
            project_bias.to(kind),
            None,
            heads,
        )
        return target

    compare(
        ["latent_write_"],
        functools.partial(written, dtype, ops.latent_write_),
        written(torch.float64, ops.latent_write_reference),
        written(dtype, ops.latent_write_reference),
    )
    return failures
