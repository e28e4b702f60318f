"""The ops in plain torch, under their `mla_attention` names, for a layer at full size.

Queries are processed in blocks so that their logits for all keys fit in memory. The ways with kernels are compared with
the same ways on these ops, and a dense way uses them to run without any kernel of ours.
"""

from __future__ import annotations

import mla_attention as ops
import torch

BLOCK = 520
"""Queries per block: a ninth of a chunk, whose float32 logits for a window take 0.8 GB."""

expand_kv_ = ops.expand_kv_reference
latent_write_ = ops.latent_write_reference
merge_pair = ops.merge_pair_reference
qk_norm_rope = ops.qk_norm_rope_reference
split_query = ops.split_query_reference


def qk_norm_rope_(out, *arguments):
    """`mla_attention.qk_norm_rope_`."""
    out.copy_(ops.qk_norm_rope_reference(*arguments))


def attend(query, *arguments):
    """`mla_attention.attend`."""
    return _joined(ops.attend_reference(part, *arguments) for part in query.split(BLOCK, dim=1))


def latent_attention(latent, pe, *arguments):
    """`mla_attention.latent_attention`."""
    parts = zip(latent.split(BLOCK, dim=1), pe.split(BLOCK, dim=1), strict=True)
    return _joined(ops.latent_attention_reference(*part, *arguments) for part in parts)


def _joined(parts):
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, dim=1), torch.cat(lse, dim=2)
