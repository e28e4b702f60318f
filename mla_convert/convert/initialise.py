"""Latent projections of one layer from its dense weights and, with `init: activation`, its samples.

Every layout is a linear target of f = [k; v]: the unrotated keys it restores, the shared rotary key
if that is derived from the latent, and the values. A low-rank code of the target then gives
`kv_a_proj` and `kv_b_proj`. Shape letters: I = heads * head_dim, H heads, D channels, R shared pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..mla.attention import DenseSelfAttention
from ..mla.rope import TIME, rotate
from .config import ConvertConfig
from .factorize import Code, low_rank_code, second_moment
from .probe import LayerSample
from .rope_key import SharedKey, complex_pairs, fastest_pairs, mean_keys, mean_rotation, shared_keys


@dataclass
class LayerInit:
    """Parameters of a `LatentSelfAttention` that its dense layer does not have, and its pairs.

    `tensors` are float32 by parameter name. `lost_energy` is the share of the target's energy,
    measured in the metric of the fit, that the code does not carry.
    """

    rope_pairs: list[int]
    nope_pairs: list[int]
    tensors: dict[str, Tensor]
    lost_energy: float | None


@dataclass
class _Target:
    """The linear map from keys `[T, H, D]` and values `[T, H, D]` to what a latent has to restore."""

    shared: SharedKey | None
    nope_pairs: list[int]
    rho: Tensor
    residual: bool
    derived: bool

    def nope(self, key: Tensor) -> Tensor:
        pairs = complex_pairs(key)
        if self.shared is not None and self.residual:
            pairs = pairs.clone()
            restored = torch.einsum("tj,jh->thj", self.kappa(key), self.shared.decoder)
            for j, pair in enumerate(self.shared.pairs):
                pairs[:, :, pair] -= restored[:, :, j]
        return torch.view_as_real((pairs * self.rho)[:, :, self.nope_pairs]).flatten(1)

    def kappa(self, key: Tensor) -> Tensor:
        assert self.shared is not None
        return torch.einsum("thj,jh->tj", complex_pairs(key)[:, :, self.shared.pairs], self.shared.encoder)

    def __call__(self, key: Tensor, value: Tensor) -> Tensor:
        parts = [self.nope(key)]
        if self.derived:
            parts.append(torch.view_as_real(self.kappa(key)).flatten(1))
        return torch.cat([*parts, value.double().flatten(1)], dim=1)

    def probes(self, sample: LayerSample) -> Tensor:
        """Sensitivity of the output to each number of the target, `[N, n]`."""
        gain = sample.key_gain.double().unsqueeze(-1)
        query = complex_pairs(sample.query)
        parts = [torch.view_as_real(gain * query[:, :, self.nope_pairs]).flatten(1)]
        if self.derived:
            assert self.shared is not None
            turned = query[:, :, self.shared.pairs] * self.shared.decoder.T.conj()
            summed = (gain * turned).sum(1) * sample.relative[:, self.shared.pairs].to(turned.dtype)
            parts.append(torch.view_as_real(summed).flatten(1))
        return torch.cat([*parts, sample.value_probe.double().flatten(1)], dim=1)


def initialise_layer(
    layer: DenseSelfAttention,
    sample: LayerSample | None,
    axes: tuple[int, ...],
    config: ConvertConfig,
    rank: int,
    generator: torch.Generator,
) -> LayerInit:
    """Everything that the latent form of `layer` needs beside the dense parameters.

    `axes` is the axis of each rotary pair. `sample` may be None unless `init: activation`. Raises
    ValueError for a rank or a rotary key larger than the layer has.
    """
    heads, pairs = layer.heads, layer.head_dim // 2
    count = config.qk_rope_head_dim // 2
    if config.init == "activation":
        assert sample is not None
        if config.position == "baked":
            sample = _baked(sample, axes)
        rho = mean_rotation(sample)
    else:
        rho = torch.ones(heads, pairs, dtype=torch.complex128)
    shared = None
    if config.position != "rotate_on_read":
        candidates = [p for p in range(pairs) if config.position != "baked" or axes[p] == TIME]
        if config.init == "activation":
            assert sample is not None
            shared = shared_keys(sample, count, candidates, config.keep_residual)
        else:
            chosen = fastest_pairs(tuple(axes[p] for p in candidates), count)
            shared = mean_keys([candidates[p] for p in chosen], heads)
    else:
        rho = torch.ones_like(rho)
    residual = config.keep_residual and config.init == "activation"
    carried = set() if shared is None or residual else set(shared.pairs)
    nope_pairs = [p for p in range(pairs) if p not in carried]
    target = _Target(shared, nope_pairs, rho, residual, config.position == "derived")
    code = None
    if config.init == "random":
        tensors = _random(layer, target, rank, generator)
    else:
        code = _fit(layer, target, sample if config.init == "activation" else None, rank, shared is None)
        tensors = _projections(layer, target, code)
    if config.q_lora_rank is not None:
        tensors |= _factorised_query(layer, config, sample, generator)
    if shared is not None:
        tensors["q_pe_coef"] = torch.view_as_real(shared.decoder.T.contiguous()).float()
    return LayerInit(
        [] if shared is None else shared.pairs,
        [] if shared is None else nope_pairs,
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        None if code is None else code.error(),
    )


def _baked(sample: LayerSample, axes: tuple[int, ...]) -> LayerSample:
    """The sample as seen by a layout whose keys carry their spatial rotation already."""
    temporal = torch.tensor([axis == TIME for axis in axes])
    return replace(
        sample,
        key=rotate(sample.key, sample.place),
        query=rotate(sample.query, sample.query_place),
        relative=torch.where(temporal, sample.relative, torch.ones_like(sample.relative)),
    )


def _fit(layer: DenseSelfAttention, target: _Target, sample: LayerSample | None, rank: int, rotated: bool) -> Code:
    """The code of the target: in the metric of the layer's output, or of the weights alone."""
    if sample is not None:
        mean, covariance = second_moment(target(sample.key, sample.value))
        if rotated:
            sample = replace(sample, query=rotate(sample.query, sample.relative))
        probes = target.probes(sample)
        return low_rank_code(covariance, probes.T @ probes / len(probes), mean, rank)
    weight, bias = _weights(layer)
    columns = weight.T.unflatten(1, (2, layer.heads, layer.head_dim))
    factor = target(columns[:, 0], columns[:, 1])
    mean = target(*bias.view(2, 1, layer.heads, layer.head_dim))[0]
    return low_rank_code(factor.T @ factor, torch.eye(factor.shape[1], dtype=factor.dtype), mean, rank)


def _weights(layer: DenseSelfAttention) -> tuple[Tensor, Tensor]:
    """`[k; v]` as a linear map of the input, `[2I, C]` and `[2I]`, with QK-norm at its mean scale.

    The scale takes the input, a modulated LayerNorm, to be white with unit variance.
    """
    w_k, b_k = layer.to_k.weight.double(), layer.to_k.bias.double()
    scale = layer.norm_k.weight.double() * (w_k.square().sum(1) + b_k.square()).mean().clamp_min(1e-12).rsqrt()
    weight = torch.cat([scale.unsqueeze(1) * w_k, layer.to_v.weight.double()])
    return weight, torch.cat([scale * b_k, layer.to_v.bias.double()])


def _as_matrix(function: Callable[[Tensor, Tensor], Tensor], heads: int, head_dim: int) -> Tensor:
    """A linear function of keys and values as a matrix `[n, 2I]`."""
    basis = torch.eye(2 * heads * head_dim, dtype=torch.float64).unflatten(1, (2, heads, head_dim))
    return function(basis[:, 0], basis[:, 1]).T


def _projections(layer: DenseSelfAttention, target: _Target, code: Code) -> dict[str, Tensor]:
    heads, head_dim = layer.heads, layer.head_dim
    nope = 2 * heads * len(target.nope_pairs)
    shared = 0 if target.shared is None or not target.derived else 2 * len(target.shared.pairs)
    tensors = {
        "kv_a_proj.weight": code.encoder @ _as_matrix(target, heads, head_dim),
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


def _random(layer: DenseSelfAttention, target: _Target, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Projections of the right shapes drawn at random, each with the gain that keeps the variance."""
    inner = layer.heads * layer.head_dim

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    restored = layer.heads * (2 * len(target.nope_pairs) + layer.head_dim)
    tensors = {"kv_a_proj.weight": draw(rank, 2 * inner), "kv_a_proj.bias": torch.zeros(rank)}
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
    weight, bias = layer.to_q.weight.double(), layer.to_q.bias.double()
    if rank > min(weight.shape):
        raise ValueError(f"q_lora_rank {rank} is larger than the rank {min(weight.shape)} of the query projection")
    if config.init == "random":
        q_a = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        q_b = torch.randn(weight.shape[0], rank, generator=generator) / rank**0.5
        return {"q_a_proj.weight": q_a, "q_b_proj.weight": q_b, "q_b_proj.bias": bias}
    moment, mean = torch.eye(weight.shape[1], dtype=torch.float64), torch.zeros(weight.shape[1], dtype=torch.float64)
    if config.init == "activation":
        assert sample is not None
        mean, moment = second_moment(sample.hidden)
    basis = torch.linalg.eigh(weight @ moment @ weight.T).eigenvectors.flip(1)[:, :rank]
    q_a = basis.T @ weight
    return {
        "q_a_proj.weight": q_a,
        "q_b_proj.weight": basis,
        "q_b_proj.bias": bias + weight @ mean - basis @ q_a @ mean,
    }
