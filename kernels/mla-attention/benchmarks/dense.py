"""Stock attention over dense keys and values, as the baselines have it: flash, cuDNN and FlexAttention, with splits.

Splits go into the batch: the keys of an item become `splits` items whose results are merged by their log-sum-exps,
one launch as without. Every baseline gets what split-KV brings to ours.
"""

from __future__ import annotations

import functools

import mla_attention as ops
import torch


def flash(query, key, value, scale):
    """Out `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` of FlashAttention; on a CPU of torch's own."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    return out, lse


def cudnn(query, key, value, scale):
    """The same of cuDNN."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[:2]


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # Every size is compiled: beyond the limit, 8, calls would silently run unfused.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex(query, key, value, scale):
    """The same of FlexAttention, compiled."""
    return _compiled_flex()(query, key, value, scale=scale, return_lse=True)


BASELINES = {"flash": flash, "cuDNN": cudnn, "FlexAttention": flex}


def attend(baseline, query, key, value, scale, splits=1):
    """`baseline` on `[B, N, H, D]`, out in the same layout; the keys must divide into `splits`."""
    batch, queries, heads, depth = query.shape
    run = BASELINES[baseline]
    if splits == 1:
        return run(*(x.transpose(1, 2) for x in (query, key, value)), scale)[0].transpose(1, 2)
    parts = [x.unflatten(1, (splits, -1)).flatten(0, 1).transpose(1, 2) for x in (key, value)]
    repeated = query.unsqueeze(1).expand(-1, splits, -1, -1, -1).reshape(batch * splits, queries, heads, depth)
    out, lse = run(repeated.transpose(1, 2), *parts, scale)
    out = out.transpose(1, 2).unflatten(0, (batch, splits)).transpose(0, 1)
    lse = lse.float().reshape(batch, splits, heads, -1)[..., :queries].transpose(0, 1).contiguous()
    return ops.merge(out, lse)[0]


def usable(query, key, value, scale, splits, names=tuple(BASELINES)):
    """Variants that run here and agree with torch's attention, by name, and why others do not."""
    found, refused = {}, {}
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), scale=scale
    ).transpose(1, 2)
    for name in names:
        for count in splits:
            label = f"{name}, {count} split{'s' * (count > 1)}"
            if key.shape[1] % count:
                refused[label] = f"{key.shape[1]} keys are not divided by {count}"
                continue
            run = functools.partial(attend, name, query, key, value, scale, count)
            try:
                difference = float((run().float() - expected.float()).abs().max() / expected.float().abs().max())
            except Exception as error:
                refused[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                continue
            if difference < 3e-2:
                found[label] = run
            else:
                refused[label] = f"differs from torch's attention by {difference:.1e} of the largest output"
    return found, refused
