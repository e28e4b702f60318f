"""Estimates the cost of each attention path on a device, from a committed table.

`device_costs.json` beside this file maps device names to measured prices;
`kernels/mla-attention/benchmarks/device_costs.py` writes an entry from a benchmark result. An unlisted device gets the
entry `default`, where every operation has the same price. Nothing is measured or tuned while a model serves.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .attention import CausalSelfAttention

if TYPE_CHECKING:
    from . import fused

TABLE = Path(__file__).with_name("device_costs.json")
DEFAULT = "default"
WAYS = ("sdpa", "attend", "absorbed")


class Costs(NamedTuple):
    """Prices of a multiply-add, relative to torch's attention at the largest measured number of queries.

    `attention` maps each of WAYS to its price at each of `queries`. `expand` is the price in the product that restores
    keys and values. `source` says where the prices come from.
    """

    device: str
    source: str
    queries: tuple[int, ...]
    attention: dict[str, tuple[float, ...]]
    expand: float

    def price(self, way: str, queries: int) -> float:
        """Price of `way` at the measured number of queries with the closest ratio to `queries`."""
        nearest = min(range(len(self.queries)), key=lambda i: abs(math.log(self.queries[i] / max(1, queries))))
        return self.attention[way][nearest]


@functools.cache
def table() -> dict[str, Costs]:
    """The committed table by device name. Raises ValueError for an incomplete entry."""
    return {name: _read(name, entry) for name, entry in json.loads(TABLE.read_text(encoding="utf-8")).items()}


def _read(name: str, entry: dict[str, Any]) -> Costs:
    queries = tuple(entry["queries"])
    attention = {way: tuple(entry["attention"][way]) for way in WAYS}
    if any(len(prices) != len(queries) or min(prices) <= 0 for prices in attention.values()) or entry["expand"] <= 0:
        raise ValueError(
            f"the entry {name!r} of {TABLE.name} needs a price above 0 for each of {list(queries)} queries"
        )
    return Costs(name, entry["source"], queries, attention, entry["expand"])


def for_device(device: torch.device) -> Costs:
    """The entry of a device, or the default entry if its name is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT
    return table().get(name, table()[DEFAULT])


def cost(
    layer: CausalSelfAttention,
    queries: int,
    keys: int,
    path: fused.Path,
    backend: fused.Backend,
    prices: Costs,
) -> float:
    """Multiply-adds, weighted by price, of one layer's attention to a full window, for one batch item."""
    restoring, attending = operations(layer, queries, keys, path)
    return restoring * prices.expand + attending * prices.price("absorbed" if path == "absorbed" else backend, queries)


def operations(layer: CausalSelfAttention, queries: int, keys: int, path: fused.Path) -> tuple[float, float]:
    """Multiply-adds that restore keys and values, and multiply-adds of the attention.

    On the absorbed path, a query-key pair costs `2 r + R` per head instead of `D + V`, and the weights that restore
    keys and values are applied to the queries. On the expanded path, they are applied to every key.
    """
    heads, wide = layer.heads, layer.expansion
    # Multiply-adds per token and head to restore a key and a value; 0 where these are cached themselves.
    restored = layer.rank * (wide.nope + wide.value)
    if path == "absorbed":
        return float(heads * queries * restored), float(heads * queries * keys * (2 * layer.rank + wide.shared))
    return float(heads * keys * restored), float(heads * queries * keys * (wide.key + wide.value))
