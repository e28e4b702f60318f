"""Compute the latent projections of a layer, or of layers that share a latent, from dense weights or from samples.

Every layout restores a linear function of f = [k; v], its target: the unrotated keys, the values and, if it is derived
from the latent, the shared rotary key. A low-rank code of the target then gives `kv_a_proj` and `kv_b_proj`. Layers
that share a latent have one code for all of their targets, as in cross-layer SVD (xKV, arXiv 2503.18893), but in the
metric of the fit. Shape letters: I = heads * head_dim, H heads, D channels, R shared pairs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..mla.attention import DenseSelfAttention
from .config import ConvertConfig
from .factorize import Code, low_rank_code, low_rank_code_of_samples, low_rank_factor
from .probe import LayerSample
from .target import Read, Target, as_read, factors, layout_target, moments, size

logger = logging.getLogger(__name__)

# Columns of a float64 matrix that are built at once: 84 MB for a layer of 14B.
COLUMNS_AT_ONCE = 1024


@dataclass
class LayerInit:
    """The new parameters of a `LatentSelfAttention`, those its dense layer does not have, and its rotary pairs.

    `tensors` are float32 by parameter name. With `derived`, the shared key is computed from the latent. `curve` lists
    `(rank, predicted rise of the loss)` for this latent alone. Only a budget sets it, on the first of the layers that
    share the latent.
    """

    rope_pairs: list[int]
    nope_pairs: list[int]
    tensors: dict[str, Tensor]
    derived: bool = False
    curve: list[tuple[int, float]] | None = None

    def truncated(self, rank: int) -> LayerInit:
        """The same fit with only the first `rank` numbers of the latent, the most important ones."""
        tensors = dict(self.tensors)
        for name in ("kv_a_proj.weight", "kv_a_proj.bias"):
            tensors[name] = tensors[name][:rank].contiguous()
        for name in ("kv_b_proj.weight", *(["k_pe_proj.weight"] if self.derived else [])):
            tensors[name] = tensors[name][:, :rank].contiguous()
        return replace(self, tensors=tensors)


@dataclass
class LayerReading:
    """What the fit needs of a dense layer: the target of its latent, and parameters that do not depend on the latent.

    `read` is the sample as transformed by `as_read`. `weights` `[2I, C]` and `[2I]` are [k; v] as a linear map of the
    input. Each is None where `init` does not need it. `tensors` are by parameter name.
    """

    target: Target
    heads: int
    head_dim: int
    read: LayerSample | None
    weights: tuple[Tensor, Tensor] | None
    tensors: dict[str, Tensor]
    generator: torch.Generator


def read_layer(
    layer: DenseSelfAttention,
    sample: LayerSample | None,
    axes: tuple[int, ...],
    config: ConvertConfig,
    generator: torch.Generator,
) -> LayerReading:
    """What `initialize_layers` needs of `layer`, whose weights may then be freed.

    `axes` is the axis of each rotary pair. `sample` is needed only for `init: activation`. Raises ValueError for a
    rotary key larger than the layer has.
    """
    read, mean = None, None
    if config.init == "activation":
        assert sample is not None
        read, mean = as_read(sample, config)
    target = layout_target(layer, read, axes, config)
    tensors: dict[str, Tensor] = {}
    if target.shared is not None:
        tensors["q_pe_coef"] = torch.view_as_real(target.shared.decoder.T.contiguous())
    if mean is not None:
        tensors["k_mean"] = mean
    weights = _weights(layer) if config.init == "svd" else None
    if config.q_lora_rank is not None:
        tensors |= _factorized_query(layer, config, sample, generator)
    return LayerReading(target, layer.heads, layer.head_dim, read, weights, tensors, generator)


def initialize_layers(
    readings: Sequence[LayerReading], config: ConvertConfig, rank: int, device: torch.device | str = "cpu"
) -> list[LayerInit]:
    """The new parameters of layers that share a latent of `rank` numbers (often a single layer).

    One code is fitted to the targets of all these layers, in the metric of their summed errors. Each layer gets its
    columns of the encoder and its rows of the decoder. The code is computed on `device`, or on the CPU if `device`
    runs out of memory; everything else is computed on the CPU. Raises ValueError for a rank larger than the target.
    """
    code = None if config.init == "random" else _fit(readings, rank, torch.device(device), config.calibration.ridge)
    plans, start = [], 0
    for reading in readings:
        if code is None:
            tensors = _random(reading, rank, len(readings))
        else:
            own = slice(start, start := start + reading.target.size(reading.heads, reading.head_dim))
            part = code._replace(encoder=code.encoder[:, own], decoder=code.decoder[own], mean=code.mean[own])
            tensors = _projections(reading, part)
        shared = reading.target.shared
        plans.append(
            LayerInit(
                [] if shared is None else shared.pairs,
                [] if shared is None else reading.target.nope_pairs,
                {name: tensor.float().contiguous() for name, tensor in (tensors | reading.tensors).items()},
                reading.target.derived,
            )
        )
    return plans


def initialize_layer(
    layer: DenseSelfAttention,
    sample: LayerSample | None,
    axes: tuple[int, ...],
    config: ConvertConfig,
    rank: int,
    generator: torch.Generator,
) -> LayerInit:
    """Run `initialize_layers` for one layer with a latent of its own."""
    return initialize_layers([read_layer(layer, sample, axes, config, generator)], config, rank)[0]


def _fit(readings: Sequence[LayerReading], rank: int, device: torch.device, ridge: float) -> Code:
    """Fit the code of the targets, in the metric of the samples if there are any, else to the weights alone."""
    read = [(reading.target, reading.read) for reading in readings if reading.read is not None]
    if read:
        try:
            return _fit_read(read, rank, device, ridge).cpu()
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
            if device.type == "cpu":
                raise
            reason = str(error).partition("\n")[0]
            logger.warning("%s cannot fit %d numbers per token; using the CPU: %s", device, size(read), reason)
            return _fit_read(read, rank, torch.device("cpu"), ridge)
    (reading,) = readings
    assert reading.weights is not None
    weight, bias = reading.weights
    columns = weight.T.unflatten(1, (2, reading.heads, reading.head_dim))
    mean = reading.target(*bias.view(2, 1, reading.heads, reading.head_dim))[0]
    return low_rank_factor(reading.target(columns[:, 0], columns[:, 1]), mean, rank)


@functools.cache
def _warn_of_few(tokens: int, numbers: int) -> None:
    logger.warning(
        "calibration samples %d tokens, fewer than the %d numbers that a latent restores of each, so the fit may miss "
        "directions; raise convert.calibration.max_tokens and clips",
        tokens,
        numbers,
    )


def _fit_read(read: Read, rank: int, device: torch.device, ridge: float) -> Code:
    if len(read[0][1].hidden) < size(read):
        _warn_of_few(len(read[0][1].hidden), size(read))
    if rank <= len(read[0][1].hidden) < size(read):
        samples, mean, probes = factors(read, device)
        return low_rank_code_of_samples(samples, probes, mean, rank, ridge)
    covariance, mean, metric = moments(read, device)
    return low_rank_code(covariance, metric, mean, rank, ridge)


def _weights(layer: DenseSelfAttention) -> tuple[Tensor, Tensor]:
    """`[k; v]` as a linear map of the input, `[2I, C]` and `[2I]`, with QK-norm at its mean scale.

    The mean scale assumes that the input, a modulated LayerNorm, is white with unit variance.
    """
    w_k, b_k, gain, w_v, b_v = (
        x.double().cpu()
        for x in (layer.to_k.weight, layer.to_k.bias, layer.norm_k.weight, layer.to_v.weight, layer.to_v.bias)
    )
    scale = gain * (w_k.square().sum(1) + b_k.square()).mean().clamp_min(1e-12).rsqrt()
    weight = torch.cat([scale.unsqueeze(1) * w_k, w_v])
    return weight, torch.cat([scale * b_k, b_v])


def _columns(function: Callable[[Tensor, Tensor], Tensor], heads: int, head_dim: int) -> Iterator[Tensor]:
    """Yield the matrix `[n, 2I]` of a linear function, `COLUMNS_AT_ONCE` columns at a time."""
    size = 2 * heads * head_dim
    for start in range(0, size, COLUMNS_AT_ONCE):
        basis = torch.zeros(min(COLUMNS_AT_ONCE, size - start), size, dtype=torch.float64)
        basis[:, start:].fill_diagonal_(1)
        unit = basis.unflatten(1, (2, heads, head_dim))
        yield function(unit[:, 0], unit[:, 1]).T


def _projections(reading: LayerReading, code: Code) -> dict[str, Tensor]:
    """Turn the code of a layer's target into the weights and biases of its latent projections."""
    target, heads, head_dim = reading.target, reading.heads, reading.head_dim
    nope = 2 * heads * len(target.nope_pairs)
    shared = 0 if target.shared is None or not target.derived else 2 * len(target.shared.pairs)
    tensors = {
        "kv_a_proj.weight": torch.cat([code.encoder @ part for part in _columns(target, heads, head_dim)], dim=1),
        "kv_a_proj.bias": -code.encoder @ code.mean,
    }

    def per_head(x: Tensor) -> Tensor:
        keys = x[:nope].unflatten(0, (heads, -1))
        return torch.cat([keys, x[nope + shared :].unflatten(0, (heads, -1))], dim=1).flatten(0, 1)

    tensors["kv_b_proj.weight"], tensors["kv_b_proj.bias"] = per_head(code.decoder), per_head(code.mean)
    if shared:
        tensors["k_pe_proj.weight"] = code.decoder[nope : nope + shared]
        tensors["k_pe_proj.bias"] = code.mean[nope : nope + shared]
    elif target.shared is not None:

        def kappa(key: Tensor, value: Tensor) -> Tensor:
            return torch.view_as_real(target.kappa(key)).flatten(1)

        tensors["k_pe_proj.weight"] = torch.cat(list(_columns(kappa, heads, head_dim)), dim=1)[:, : heads * head_dim]
        tensors["k_pe_proj.bias"] = torch.zeros(2 * len(target.shared.pairs))
    return tensors


def _random(reading: LayerReading, rank: int, layers: int) -> dict[str, Tensor]:
    """Draw projections of the right shapes at random, each with the gain that preserves the variance.

    The latent is the sum over the `layers` that share it, so each encoder is smaller by their square root.
    """
    target, heads, generator = reading.target, reading.heads, reading.generator
    inner = heads * reading.head_dim

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    restored = heads * (2 * len(target.nope_pairs) + reading.head_dim)
    tensors = {"kv_a_proj.weight": draw(rank, 2 * inner) / layers**0.5, "kv_a_proj.bias": torch.zeros(rank)}
    tensors |= {"kv_b_proj.weight": draw(restored, rank), "kv_b_proj.bias": torch.zeros(restored)}
    if target.shared is not None:
        channels = 2 * len(target.shared.pairs)
        tensors["k_pe_proj.weight"] = draw(channels, rank if target.derived else inner)
        tensors["k_pe_proj.bias"] = torch.zeros(channels)
    return tensors


def _factorized_query(
    layer: DenseSelfAttention, config: ConvertConfig, sample: LayerSample | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Factorize the queries as `q_b_proj @ q_a_proj` of rank `q_lora_rank`, the best fit on the calibration inputs.

    The inputs are those of every token that makes a query. Most are noisy, also where only clean tokens are cached.
    """
    rank = config.q_lora_rank
    assert rank is not None
    weight, bias = layer.to_q.weight.double().cpu(), layer.to_q.bias.double().cpu()
    if config.init == "random":
        q_a = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        q_b = torch.randn(weight.shape[0], rank, generator=generator) / rank**0.5
        return {"q_a_proj.weight": q_a, "q_b_proj.weight": q_b, "q_b_proj.bias": bias}
    moment, mean = torch.eye(weight.shape[1], dtype=torch.float64), torch.zeros(weight.shape[1], dtype=torch.float64)
    if config.init == "activation":
        assert sample is not None
        hidden = sample.queried.double()
        mean, moment = hidden.mean(0), torch.cov(hidden.T, correction=0)
    basis = torch.linalg.eigh(weight @ moment @ weight.T).eigenvectors.flip(1)[:, :rank]
    q_a = basis.T @ weight
    return {
        "q_a_proj.weight": q_a,
        "q_b_proj.weight": basis,
        "q_b_proj.bias": bias + weight @ mean - basis @ q_a @ mean,
    }
