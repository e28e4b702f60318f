"""Stock attention over dense keys and values as a baseline: flash, cuDNN and FlexAttention, with splits.

Splits become batch items: the keys of an item are divided into `splits` items, whose results are merged by their
log-sum-exps. This is one launch, as without splits, and gives every baseline the benefit of our split-KV.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mla_attention as ops
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from watch import barred, require_answer

CUDNN_WHOLE = 91501
"""cuDNN 9.15.1: the first version that is right for every length; older ones need multiples of 128."""
CUDNN_TILE = 128


def torch_attention(query, key, value, scale=None):
    """torch's own attention on `[B, N, H, D]`, with the backend that torch chooses."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def torch_runs(query, key, value):
    """Name of the backend that torch's attention uses on `[B, N, H, D]`; None if torch does not report it."""
    try:
        return SDPBackend(torch._fused_sdp_choice(*(x.transpose(1, 2) for x in (query, key, value)))).name
    except Exception:
        return None


def cudnn_refusal(version, *lengths):
    """Why cuDNN's attention is not used for these sequence lengths, in one line; None if it is."""
    if version is None:
        return "torch has no cuDNN"
    odd = [str(length) for length in lengths if length % CUDNN_TILE]
    if version < CUDNN_WHOLE and odd:
        return f"cuDNN {version} is wrong for lengths not divisible by {CUDNN_TILE}: {', '.join(odd)} (pytorch#169849)"
    return None


def flash(query, key, value, scale):
    """Output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` of FlashAttention; on a CPU, of torch's own kernel."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    return out, lse


def cudnn(query, key, value, scale):
    """Output and log-sum-exp of cuDNN's attention."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[:2]


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # Every size is compiled. Beyond the default limit of 8, calls would silently run unfused.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex(query, key, value, scale):
    """Output and log-sum-exp of compiled FlexAttention."""
    return _compiled_flex()(query, key, value, scale=scale, return_lse=True)


BASELINES = {"flash": flash, "cuDNN": cudnn, "FlexAttention": flex}
TORCH = "torch"


@dataclass(frozen=True)
class Stock:
    """A stock attention with a number of splits; call it with queries, keys and values `[B, N, H, D]`."""

    name: str
    scale: float
    splits: int = 1

    @classmethod
    def named(cls, label, scale):
        """The stock attention with this label."""
        name, _, splits = label.partition(", ")
        return cls(name, scale, int(splits.split()[0]) if splits else 1)

    @property
    def label(self):
        """For example `flash, 2 splits`. torch's own choice is never split: it returns no log-sum-exp."""
        return TORCH if self.name == TORCH else f"{self.name}, {self.splits} split{'s' * (self.splits > 1)}"

    def __call__(self, query, key, value):
        if self.name == TORCH:
            return torch_attention(query, key, value, self.scale)
        return attend(self.name, query, key, value, self.scale, self.splits)


def with_lse(baseline, query, key, value, scale):
    """`baseline` on `[B, N, H, D]`: output in the same layout and log-sum-exp, float32 `[B, H, N]`."""
    batch, queries, heads, _ = query.shape
    out, lse = BASELINES[baseline](*(x.transpose(1, 2) for x in (query, key, value)), scale)
    # Some backends pad the queries or add an axis.
    return out.transpose(1, 2).contiguous(), lse.float().reshape(batch, heads, -1)[..., :queries].contiguous()


def attend(baseline, query, key, value, scale, splits=1):
    """`baseline` on `[B, N, H, D]`, output in the same layout; `splits` must divide the number of keys."""
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


def usable(query, key, value, scale, splits, names):
    """Stock attentions that run and agree with `yardstick`, by label, torch's own first; reasons why others do not."""
    found, refused = {}, {}
    expected = yardstick(query, key, value, scale).float()
    for stock in (Stock(TORCH, scale), *(Stock(name, scale, count) for name in names for count in splits)):
        if key.shape[1] % stock.splits:
            refused[stock.label] = f"{key.shape[1]} keys are not divisible by {stock.splits}"
            continue
        if stock.name == "cuDNN" and query.device.type == "cuda":
            reason = cudnn_refusal(torch.backends.cudnn.version(), query.shape[1], key.shape[1] // stock.splits)
            if reason is not None:
                refused[stock.label] = reason
                continue
        if reason := barred(stock.label):
            refused[stock.label] = reason
            continue
        try:
            difference = float((stock(query, key, value).float() - expected).abs().max() / expected.abs().max())
        except Exception as error:
            require_answer(query.device, error)
            refused[stock.label] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        if difference < 3e-2:
            found[stock.label] = stock
        else:
            refused[stock.label] = f"differs from torch's attention by {difference:.1e} of the largest output"
    return found, refused


def yardstick(query, key, value, scale):
    """torch's attention on `[B, N, H, D]` by a backend known to be right, so not cuDNN."""
    if query.device.type != "cuda":
        return torch_attention(query, key, value, scale)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        return torch_attention(query, key, value, scale)
