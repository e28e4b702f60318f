"""The fit is optimal in its metric, every init works in every layout, and errors name bad input."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch

from mla_convert.convert import CalibrationBatch
from mla_convert.convert.config import ConvertConfig
from mla_convert.convert.factorize import Code, low_rank_code, low_rank_code_of_samples, low_rank_factor
from mla_convert.convert.rope_key import complex_pairs, fastest_pairs
from mla_convert.convert.state import merge_state
from mla_convert.convert.surgery import convert_model
from mla_convert.errors import UsageError, UserError
from mla_convert.families.wan import FAMILY
from mla_convert.mla.rope import HEIGHT, TIME, WIDTH


def metric_error(covariance: torch.Tensor, metric: torch.Tensor, product: torch.Tensor) -> float:
    left = torch.eye(len(product), dtype=product.dtype) - product
    return float(torch.trace(metric @ left @ covariance @ left.T))


def lost(code: Code) -> float:
    """Share of the metric's energy that a code loses."""
    return 1 - float(code.energy.sum()) / code.total


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_perturbation_of_the_code_lowers_its_error(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    samples = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.1, 12)
    probes = torch.randn(300, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, 12)
    covariance = torch.cov(samples.T, correction=0)
    metric = probes.T @ probes / len(probes)
    code = low_rank_code(covariance, metric, samples.mean(0), rank)
    best = metric_error(covariance, metric, code.decoder @ code.encoder)
    assert best == pytest.approx(lost(code) * code.total, rel=1e-4)
    for _ in range(50):
        encoder = code.encoder + 1e-3 * torch.randn(code.encoder.shape, generator=generator, dtype=torch.float64)
        decoder = code.decoder + 1e-3 * torch.randn(code.decoder.shape, generator=generator, dtype=torch.float64)
        assert metric_error(covariance, metric, decoder @ encoder) >= best * (1 - 1e-6)


@pytest.mark.parametrize(("tokens", "rank"), [(20, 5), (20, 20), (39, 12)])
def test_a_code_of_few_samples_is_that_of_their_moments(tokens: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    samples = torch.randn(tokens, 40, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.1, 40)
    probes = torch.randn(tokens, 40, generator=generator, dtype=torch.float64) * torch.linspace(0.01, 2, 40)
    mean = torch.zeros(40, dtype=torch.float64)
    code = low_rank_code_of_samples(samples.clone(), probes, mean, rank)
    moments = samples.T @ samples, probes.T @ probes
    whole = low_rank_code(*moments, mean, rank)
    # Observed at most 2e-12 of the total.
    assert code.total == pytest.approx(whole.total)
    errors = [metric_error(*moments, c.decoder @ c.encoder) / whole.total for c in (code, whole)]
    assert errors[0] == pytest.approx(errors[1], abs=1e-10)
    torch.testing.assert_close(samples @ (code.decoder @ code.encoder).T, samples @ (whole.decoder @ whole.encoder).T)


def test_directions_that_no_sample_has_are_filled_up() -> None:
    generator = torch.Generator().manual_seed(0)
    spanned = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    samples = torch.randn(20, 3, generator=generator, dtype=torch.float64) @ spanned
    probes = torch.randn(20, 40, generator=generator, dtype=torch.float64) * torch.linspace(0.01, 2, 40)
    code = low_rank_code_of_samples(samples, probes, torch.zeros(40, dtype=torch.float64), 8)
    # Observed 3e-12 and 8e-16 of the largest.
    torch.testing.assert_close(code.encoder @ code.decoder, torch.eye(8).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(samples @ (code.decoder @ code.encoder).T, samples)
    assert lost(code) == pytest.approx(0, abs=1e-12)


def test_a_full_code_is_the_identity_even_where_the_data_is_degenerate() -> None:
    samples = torch.ones(20, 6, dtype=torch.float64)
    samples[:, 0] = torch.arange(20)
    covariance = torch.cov(samples.T, correction=0)
    code = low_rank_code(covariance, torch.zeros(6, 6, dtype=torch.float64), samples.mean(0), 6)
    torch.testing.assert_close(code.decoder @ code.encoder, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "rank"), [(5, 3), (5, 5), (9, 6), (3, 5)])
def test_a_code_of_a_factor_is_that_of_its_gram_matrix(rows: int, rank: int) -> None:
    factor = torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    mean = torch.zeros(7, dtype=torch.float64)
    small = low_rank_factor(factor, mean, rank)
    whole = low_rank_code(factor.T @ factor, torch.zeros(7, 7, dtype=torch.float64), mean, rank)
    # Observed at most 2e-14; beyond the rank of the factor any direction serves.
    torch.testing.assert_close(factor @ (small.decoder @ small.encoder).T, factor @ (whole.decoder @ whole.encoder).T)
    assert lost(small) == pytest.approx(lost(whole), abs=1e-12)


@pytest.mark.parametrize("init", ["random", "svd", "activation"])
@pytest.mark.parametrize("variant", pico.VARIANTS, ids=lambda v: f"{v['position']}-{v['own_chunk']}")
def test_every_init_in_every_layout_runs(variant: dict[str, Any], init: str) -> None:
    model = pico.convert(pico.dense_model(), init=init, **variant)
    assert torch.isfinite(model(*pico.inputs(2, 7, 6, 4)).sample).all()
    assert model.mla.scalars_per_token() == 20


def test_activations_beat_weights_and_weights_beat_chance() -> None:
    dense = pico.dense_model(layers=3)
    clip = pico.inputs(4, 8, 6, 4, seed=10)
    expected = dense(*clip).sample
    errors = {}
    for init in ("random", "svd", "activation"):
        model = pico.convert(dense, init=init, position="rotate_on_read", kv_lora_rank=16, own_chunk="latent")
        errors[init] = float((model(*clip).sample - expected).square().mean())
    assert errors["activation"] < errors["svd"] < errors["random"]


@pytest.mark.parametrize("init", ["svd", "activation"])
def test_queries_of_full_rank_are_unchanged(init: str) -> None:
    dense = pico.dense_model()
    model = pico.convert(dense, init=init, kv_lora_rank=48, q_lora_rank=24)
    clip = pico.inputs(2, 7, 6, 4)
    assert pico.relative_error(model(*clip).sample, dense(*clip).sample) < 2e-5
    assert not any(name.endswith("to_q.weight") and "attn1" in name for name in model.state_dict())


def test_queries_are_fitted_to_noisy_tokens_too() -> None:
    """Only clean tokens are cached under an exact own chunk, but the noisy ones ask."""
    dense = pico.dense_model(layers=1)
    clean, _, text = pico.inputs(4, 8, 6, 4, seed=10)
    # One number a patch, so that clean tokens lie on a line.
    clean = clean[:, :, :, ::2, ::2].repeat_interleave(2, 3).repeat_interleave(2, 4)
    clean[:, 1] = 0
    config = ConvertConfig(kv_lora_rank=12, q_lora_rank=4, calibration=pico.calibration(clips=4))
    model = convert_model(FAMILY, dense, config, [CalibrationBatch(clean, text)])
    seen: list[torch.Tensor] = []
    hook = dense.blocks[0].attn1.register_forward_hook(lambda _, args, output: seen.append(args[0].double()))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    dense(0.5 * clean + 0.5 * noise, torch.full((4,), 500.0), text, context=clean)
    hook.remove()
    to_q, latent = dense.blocks[0].attn1.to_q, model.blocks[0].attn1
    asked, noisy = (to_q.weight.double() @ x.flatten(0, 1).T for x in seen[0].split(4))

    def missed(fitted: torch.Tensor) -> float:
        """The error of noisy queries in the best basis of rank 4 for the `fitted` ones, as a share of all."""
        basis = torch.linalg.svd(fitted - fitted.mean(1, keepdim=True))[0][:, :4]
        centered = noisy - noisy.mean(1, keepdim=True)
        return float((centered - basis @ (basis.T @ centered)).square().sum() / centered.square().sum())

    made = latent.q_b_proj.weight.double() @ latent.q_a_proj.weight.double() @ seen[0][4:].flatten(0, 1).T
    error = (made - noisy) - (made - noisy).mean(1, keepdim=True)
    share = float(error.square().sum() / (noisy - noisy.mean(1, keepdim=True)).square().sum())
    # Observed: 0.160, 0.132 and 0.512.
    assert share < (missed(noisy) + missed(asked)) / 2


def test_the_dense_model_is_left_alone() -> None:
    dense = pico.dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    clip = pico.inputs(2, 7, 6, 4)
    expected = dense(*clip).sample
    pico.convert(dense, kv_lora_rank=6)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(dense(*clip).sample, expected)


def test_two_conversions_are_the_same_bytes() -> None:
    first, second = (pico.convert(pico.dense_model(), kv_lora_rank=9).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unaccounted_tensor_is_an_error() -> None:
    dense = pico.dense_model()
    source = dict(dense.state_dict(), stray=torch.zeros(1))
    with pytest.raises(RuntimeError, match="neither used, kept nor declared dropped: \\['stray'\\]"):
        merge_state(source, [], dense.state_dict())


def test_paper_pairs_are_the_fast_ones_of_each_axis() -> None:
    axes = (TIME,) * 22 + (HEIGHT,) * 21 + (WIDTH,) * 21
    assert fastest_pairs(axes, 16) == [*range(6), *range(22, 27), *range(43, 48)]


def test_shared_keys_are_not_fewer_than_asked() -> None:
    key = torch.randn(5, 2, 12)
    assert torch.equal(torch.view_as_real(complex_pairs(key)).flatten(-2), key.double())
    with pytest.raises(UsageError, match=r"qk_rope_head_dim: 26 is larger than the 24 rotary channels of all"):
        pico.convert(pico.dense_model(), position="derived", kv_lora_rank=8, qk_rope_head_dim=26)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_lora_rank": 49}, "49 in layer 0 is not between 1 and 48"),
        ({"kv_lora_rank": [8, 8, 8]}, "lists 3 layers, the model has 2"),
        ({"q_lora_rank": 25, "kv_lora_rank": 8}, "q_lora_rank: 25 is larger than the rank 24 of the queries"),
    ],
)
def test_impossible_ranks_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pico.convert(pico.dense_model(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "decoupled", "qk_rope_head_dim": 5}, "must be even"),
        ({"position": "decoupled"}, "needs a shared rotary key"),
        ({"position": "rotate_on_read", "qk_rope_head_dim": 4}, "has no shared rotary key"),
        ({"position": "twisted"}, "decoupled"),
        ({"kv_lora_rank": 0}, "greater than or equal to 1"),
    ],
)
def test_layouts_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**settings)


def test_degenerate_calibration_still_converts() -> None:
    """Fewer tokens than the rank, and a layer in which all keys and all values are equal."""
    dense = pico.dense_model()
    dense.blocks[0].attn1.to_k.weight.zero_()
    dense.blocks[0].attn1.to_v.weight.zero_()
    config = ConvertConfig(kv_lora_rank=40, calibration={"clips": 1, "batch_size": 1, "max_tokens": 8})
    model = convert_model(FAMILY, dense, config, pico.batches()[:1])
    assert torch.isfinite(model(*pico.inputs(2, 7, 6, 4)).sample).all()


def test_infinite_activations_are_named() -> None:
    dense = pico.dense_model()
    dense.blocks[1].attn1.to_v.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN or infinite values in the value of layer 1"):
        pico.convert(dense, kv_lora_rank=8)


def test_clips_of_one_chunk_cannot_calibrate_an_exact_own_chunk() -> None:
    config = ConvertConfig(kv_lora_rank=8, own_chunk="exact")
    with pytest.raises(UserError, match="one chunk long"):
        convert_model(FAMILY, pico.dense_model(), config, pico.batches(frames=2))


def test_mixed_dtypes_are_kept() -> None:
    dense = pico.dense_model().to(torch.bfloat16)
    dense.blocks[0].norm2.float()
    model = pico.convert(dense, kv_lora_rank=8, init="svd")
    assert model.blocks[0].norm2.weight.dtype is torch.float32
    assert model.blocks[0].attn1.kv_a_proj.weight.dtype is torch.bfloat16
