"""Latent projections of a layer, or of layers that share a latent: from dense weights or, fitted, from samples.

Every layout is a linear target of f = [k; v]: the unrotated keys it restores, the shared rotary key
if that is derived from the latent, and the values. A low-rank code of the target then gives
`kv_a_proj` and `kv_b_proj`. Layers that share a latent have one code for all of their targets, as in
cross-layer SVD (xKV, arXiv 2503.18893), here in the metric of the fit. Shape letters: I = heads *
head_dim, H heads, D channels, R shared pairs.
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

# Columns of a float64 matrix that are made at once, 84 MB of those of a 14B layer.
COLUMNS_AT_ONCE = 1024


@dataclass
class LayerInit:
    """Parameters of a `LatentSelfAttention` that its dense layer does not have, and its pairs.

    `tensors` are float32 by parameter name. With `derived` the shared key comes from the latent. `curve` are
    `[rank, predicted rise of the loss]` of this latent alone, where a budget asked for them; the first of the
    layers that share it has them.
    """

    rope_pairs: list[int]
    nope_pairs: list[int]
    tensors: dict[str, Tensor]
    derived: bool = False
    curve: list[tuple[int, float]] | None = None

    def truncated(self, rank: int) -> LayerInit:
        """The same fit with the first `rank` latents alone, which are the most important ones."""
        tensors = dict(self.tensors)
        for name in ("kv_a_proj.weight", "kv_a_proj.bias"):
            tensors[name] = tensors[name][:rank].contiguous()
        for name in ("kv_b_proj.weight", *(["k_pe_proj.weight"] if self.derived else [])):
            tensors[name] = tensors[name][:, :rank].contiguous()
        return replace(self, tensors=tensors)


@dataclass
class LayerReading:
    """What a layer's latent has to restore, and what its latent form needs that does not depend on the latent.

    `read` is the sample `as_read` by the target, `weights` `[2I, C]` and `[2I]` are [k; v] as a linear map of the
    input; each None where `init` does not ask for it. `tensors` are by parameter name.
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
    """What `initialise_layers` needs of `layer`, which may be let go then.

    `axes` is the axis of each rotary pair. `sample` may be None unless `init: activation`. Raises
    ValueError for a rotary key larger than the layer has.
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
        tensors |= _factorised_query(layer, config, sample, generator)
    return LayerReading(target, layer.heads, layer.head_dim, read, weights, tensors, generator)


def initialise_layers(
    readings: Sequence[LayerReading], config: ConvertConfig, rank: int, device: torch.device | str = "cpu"
) -> list[LayerInit]:
    """Everything that the latent forms of layers need that share a latent of `rank` numbers; often it is one layer.

    One code restores what all of them need, in the metric of all their errors together, and each layer gets
    its columns of the encoder and its rows of the decoder. The code is found on `device` where its memory holds
    that, everything else on the CPU. Raises ValueError for a rank that is larger than the layers have.
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


def initialise_layer(
    layer: DenseSelfAttention,
    sample: LayerSample | None,
    axes: tuple[int, ...],
    config: ConvertConfig,
    rank: int,
    generator: torch.Generator,
) -> LayerInit:
    """`initialise_layers` for a layer with a latent of its own."""
    return initialise_layers([read_layer(layer, sample, axes, config, generator)], config, rank)[0]


def _fit(readings: Sequence[LayerReading], rank: int, device: torch.device, ridge: float) -> Code:
    """The code of the targets: in the metric of the model's or the layer's output, or of the weights alone."""
    read = [(reading.target, reading.read) for reading in readings if reading.read is not None]
    if read:
        try:
            return _fit_read(read, rank, device, ridge).cpu()
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
            if device.type == "cpu":
                raise
            reason = str(error).partition("\n")[0]
            logger.warning("%s cannot fit %d numbers, which is done on the CPU: %s", device, size(read), reason)
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
        "calibration looks at %d tokens for the %d numbers that a latent restores of each: what they do not show it "
        "cannot fit; raise convert.calibration.max_tokens, and clips",
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

    The scale takes the input, a modulated LayerNorm, to be white with unit variance.
    """
    w_k, b_k, gain, w_v, b_v = (
        x.double().cpu()
        for x in (layer.to_k.weight, layer.to_k.bias, layer.norm_k.weight, layer.to_v.weight, layer.to_v.bias)
    )
    scale = gain * (w_k.square().sum(1) + b_k.square()).mean().clamp_min(1e-12).rsqrt()
    weight = torch.cat([scale.unsqueeze(1) * w_k, w_v])
    return weight, torch.cat([scale * b_k, b_v])


def _as_matrix(function: Callable[[Tensor, Tensor], Tensor], heads: int, head_dim: int) -> Tensor:
    """A linear function of keys and values as a matrix `[n, 2I]`."""
    return torch.cat(list(_columns(function, heads, head_dim)), dim=1)


def _columns(function: Callable[[Tensor, Tensor], Tensor], heads: int, head_dim: int) -> Iterator[Tensor]:
    """The matrix of a linear function `[n, 2I]`, some of its columns at a time."""
    size = 2 * heads * head_dim
    for start in range(0, size, COLUMNS_AT_ONCE):
        basis = torch.zeros(min(COLUMNS_AT_ONCE, size - start), size, dtype=torch.float64)
        basis[:, start:].fill_diagonal_(1)
        unit = basis.unflatten(1, (2, heads, head_dim))
        yield function(unit[:, 0], unit[:, 1]).T


def _projections(reading: LayerReading, code: Code) -> dict[str, Tensor]:
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

        tensors["k_pe_proj.weight"] = _as_matrix(kappa, heads, head_dim)[:, : heads * head_dim]
        tensors["k_pe_proj.bias"] = torch.zeros(2 * len(target.shared.pairs))
    return tensors


def _random(reading: LayerReading, rank: int, layers: int) -> dict[str, Tensor]:
    """Projections of the right shapes drawn at random, each with the gain that keeps the variance.

    The latent is the sum of what so many `layers` make of their keys and values.
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


def _factorised_query(
    layer: DenseSelfAttention, config: ConvertConfig, sample: LayerSample | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """`q_b_proj @ q_a_proj` of rank `q_lora_rank`: the best fit of the queries on the calibration inputs."""
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
        hidden = sample.hidden.double()
        mean, moment = hidden.mean(0), torch.cov(hidden.T, correction=0)
    basis = torch.linalg.eigh(weight @ moment @ weight.T).eigenvectors.flip(1)[:, :rank]
    q_a = basis.T @ weight
    return {
        "q_a_proj.weight": q_a,
        "q_b_proj.weight": basis,
        "q_b_proj.bias": bias + weight @ mean - basis @ q_a @ mean,
    }
