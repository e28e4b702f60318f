"""Compares the attention maps of a converted model's heads with the teacher's, on the teacher's inputs.

Each query of a chunk with a history gives a distribution over the keys it sees: p with the teacher's queries and
keys, q with the student's. Values are ignored, so this measures where a head looks, not what it reads there.
Shape letters: B clips, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..families.causal import CausalTransformer
from ..mla.attention import AttentionPass, CausalSelfAttention, padded
from ..mla.core import KeyValue, Query
from .beside import Beside

QUERIES = 32
"""Number of evenly spaced queries measured per chunk."""
# Maximum number of logits in memory, per model.
_ENTRIES = 1 << 26


def head_logits(
    layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass, queries: int = QUERIES
) -> Iterator[tuple[Tensor, int]]:
    """Yield the scaled logits `[B, H, Q, K]`, float32, of each chunk with a history, and its number of history keys.

    `hidden_states` `[B', S, C]` belong to a pass over a whole clip. The clean context of teacher forcing is left
    out; the other items come in groups of B to bound the memory. The keys are those of
    `CausalSelfAttention.eager_attention`, history first.
    """
    query, key, value = layer.project(hidden_states)
    plain = Query(None, layer.split_heads(query))
    for_history = layer.history_query(plain, step)
    if step.latents is not None:
        clip = layer.expand(step.latents)
    else:
        clip = layer.restore(key[: step.context_batch], value[: step.context_batch], step)
    if layer.own_chunk_exact:
        own = KeyValue(None, layer.split_heads(key), layer.split_heads(value))
    else:
        own, plain = layer.restore(key, value, step), for_history
    first = step.context_batch or 0
    for view in step.views:
        if not view.has_history:
            continue
        count = view.own.stop - view.own.start
        picked = torch.linspace(0, count - 1, min(queries, count), device=query.device).round().long()
        own_query = plain.tokens(view.own).rotated(view.own_rotations)[first:, picked]
        past_query = for_history.tokens(view.own).rotated(view.own_rotations)[first:, picked]
        own_keys = padded(own.tokens((view.own,)).keys(view.own_rotations), view.zero_keys)[first:]
        past_keys = clip.tokens(view.history).keys(view.history_rotations)
        if step.context_batch is None:
            past_keys = past_keys[first:]
        else:
            past_keys = past_keys.repeat(len(past_query) // step.context_batch, 1, 1, 1)
        keys = past_keys.shape[1] + own_keys.shape[1]
        group = max(1, _ENTRIES // (layer.heads * len(picked) * keys))
        for items in torch.arange(len(own_query), device=query.device).split(group):
            logits = [
                torch.einsum("bqhd,bkhd->bhqk", q[items].float(), k[items].float())
                for q, k in ((past_query, past_keys), (own_query, own_keys))
            ]
            yield layer.scale * torch.cat(logits, dim=-1), past_keys.shape[1]


def divergence(teacher: Tensor, student: Tensor, history: int) -> Tensor:
    """Five measures by head, summed over clips and queries, float64 `[5, H]`, from logits `[B, H, Q, K]`.

    They stay on the device of the logits. They are the total variation `1/2 sum |p - q|`; the Kullback-Leibler
    divergence `sum p log(p / q)` in nats; the mean square over keys of the logit difference minus its mean (a constant
    changes no attention); and the shares of p and of q on the first `history` keys.
    """
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    difference = student - teacher
    difference = difference - difference.mean(-1, keepdim=True)
    measures = [
        (p - q).abs().sum(-1) / 2,
        (p * (log_p - log_q)).sum(-1),
        difference.square().mean(-1),
        p[..., :history].sum(-1),
        q[..., :history].sum(-1),
    ]
    return torch.stack([measure.double().sum((0, 2)) for measure in measures])


class AttentionMaps:
    """Collects the `divergence` of every head while the teacher runs; `close` ends it and returns the result."""

    def __init__(self, student: CausalTransformer, teacher: CausalTransformer, queries: int = QUERIES) -> None:
        self.student, self.teacher, self.queries = student, teacher, queries
        self.sums: list[Any] = [0.0] * len(teacher.blocks)
        self.counts = [0] * len(teacher.blocks)
        self.beside = Beside(student, teacher, self._compare)

    def _compare(
        self, number: int, hidden_states: Tensor, step: AttentionPass, out: Tensor, student_step: AttentionPass
    ) -> None:
        student, teacher = self.student.blocks[number].attn1, self.teacher.blocks[number].attn1
        dtype = next(student.parameters()).dtype
        pairs = zip(
            head_logits(teacher, hidden_states, step, self.queries),
            head_logits(student, hidden_states.to(dtype), student_step, self.queries),
            strict=True,
        )
        for (expected, history), (actual, _) in pairs:
            self.sums[number] = self.sums[number] + divergence(expected, actual, history)
            self.counts[number] += expected.shape[0] * expected.shape[2]

    def close(self) -> list[dict[str, Any]]:
        """Remove the hooks and return one dict per layer with means by head; empty if no chunk has a history.

        Keys: `total_variation` in [0, 1], `kl_divergence` in nats, `logit_error`, the root mean square of the logit
        difference, and `history_share` of `teacher` and `student`.
        """
        self.beside.close()
        layers = []
        for sums, count in zip(self.sums, self.counts, strict=True):
            if count == 0:
                return []
            variation, kl, squared, teacher, student = (sums / count).tolist()
            layers.append(
                {
                    "total_variation": variation,
                    "kl_divergence": kl,
                    "logit_error": [value**0.5 for value in squared],
                    "history_share": {"teacher": teacher, "student": student},
                }
            )
        return layers
