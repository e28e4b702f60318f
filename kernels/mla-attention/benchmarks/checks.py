"""Every op against its float64 reference, and against what plain torch loses at the same dtype."""

from __future__ import annotations

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


SIZES = ((10, 40, 3, 64, 96), (25, 40, 3, 64, 96))
"""Tokens a frame, queries, heads, channels a head and rank: less than a block of keys, and some blocks."""
MEASURED = tuple((150, 100, 12, 128, rank) for rank in (192, 64, 448))
"""More of them, in the tiles that are timed: many queries, and several blocks of any size, the last not full."""


def check_all(device, dtype, seed=0):
    """Names of the ops that are less exact than they may be, with both errors; an empty list is a pass.

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

    def compare(name, actual, exact, plain):
        error, allowed = relative_error(actual, exact), max(FACTOR * relative_error(plain, exact), FLOOR[dtype])
        if not error <= allowed:
            failures.append(f"{name}, {keys} keys, rank {rank}: error {error:.2e}, allowed {allowed:.2e}")

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
        compare(
            f"attend, {splits} splits",
            ops.attend(query, key, value, None, scale, splits)[0],
            exact,
            plain.transpose(1, 2),
        )

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
        found, _ = ops.latent_attention(latent, pe, rows, None, slots, count, turn, scale, splits)
        compare(f"latent_attention, {splits} splits", found, exact, plain)

    nope = depth - shared
    up, bias = random(heads * (nope + depth), rank), random(heads * (nope + depth))
    shape = (batch, keys, heads, depth)

    def expanded(kind, function):
        out = [torch.zeros(shape, device=device, dtype=kind) for _ in range(2)]
        function(
            *out,
            rows.to(kind),
            None,
            slots,
            count,
            up.to(kind),
            bias.to(kind),
            None,
            None,
            turn.to(torch.float64 if kind == torch.float64 else torch.float32),
            False,
        )
        return out

    exact_parts = expanded(torch.float64, ops.expand_kv_reference)
    plain_parts = expanded(dtype, ops.expand_kv_reference)
    for name, found, reference, usual in zip(
        ("keys", "values"), expanded(dtype, ops.expand_kv_), exact_parts, plain_parts, strict=True
    ):
        compare(f"expand_kv_, {name}", found, reference, usual)

    gain, hidden = random(heads * depth), random(batch, queries, heads * depth)
    angle = torch.rand(queries, depth // 2, device=device, generator=generator)
    turned = torch.stack([angle.cos(), angle.sin()], dim=-1)
    exact = ops.qk_norm_rope_reference(hidden.double(), gain.double(), 1e-6, turned.double(), heads)
    plain = ops.qk_norm_rope_reference(hidden, gain, 1e-6, turned, heads)
    compare("qk_norm_rope", ops.qk_norm_rope(hidden, gain, 1e-6, turned, heads), exact, plain)

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
        "latent_write_",
        written(dtype, ops.latent_write_),
        written(torch.float64, ops.latent_write_reference),
        written(dtype, ops.latent_write_reference),
    )
    return failures
