"""Triton kernels for multi-head latent attention over a ring of cached video frames."""

from __future__ import annotations

from ._runtime import lacking, why_not
from .attend import attend, attend_reference, why_not_attend
from .expand_kv import expand_kv_, expand_kv_reference, why_not_expand_kv
from .latent_attention import latent_attention, latent_attention_reference, why_not_latent_attention
from .latent_write import latent_write_, latent_write_reference, why_not_latent_write
from .merge import merge, merge_reference, why_not_merge
from .merge_pair import merge_pair, merge_pair_reference
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_, qk_norm_rope_reference, why_not_qk_norm_rope
from .quantize import dequantize_rows, quantize_rows
from .split_query import split_query, split_query_reference
from .splits import split_count

__all__ = [
    "attend",
    "attend_reference",
    "dequantize_rows",
    "expand_kv_",
    "expand_kv_reference",
    "lacking",
    "latent_attention",
    "latent_attention_reference",
    "latent_write_",
    "latent_write_reference",
    "merge",
    "merge_pair",
    "merge_pair_reference",
    "merge_reference",
    "qk_norm_rope",
    "qk_norm_rope_",
    "qk_norm_rope_reference",
    "quantize_rows",
    "split_count",
    "split_query",
    "split_query_reference",
    "why_not",
    "why_not_attend",
    "why_not_expand_kv",
    "why_not_latent_attention",
    "why_not_latent_write",
    "why_not_merge",
    "why_not_qk_norm_rope",
]
