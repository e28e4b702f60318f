"""Norm over all heads, and rotation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_case import DEVICE, DTYPES, EPSILON, error, randn, unit_rotations
from mla_attention import qk_norm_rope, qk_norm_rope_, qk_norm_rope_reference, why_not_qk_norm_rope
from mla_attention._ops import ops

EPS = 1e-6


def case(heads=3, channels=24, batch=2, tokens=7, dtype=torch.float32, rotated=True, scale=1.0):
    """Arguments of `qk_norm_rope`."""
    x = randn(batch, tokens, heads * channels, dtype=dtype, seed=1, scale=scale)
    weight = 1 + randn(heads * channels, dtype=dtype, seed=2, scale=0.1)
    return [x, weight, EPS, unit_rotations(tokens, channels // 2, seed=3) if rotated else None, heads]


def by_torch(x, weight, eps, rotations, heads, dtype):
    """The definition in a dtype, with the rotation as a complex product in float32 or wider."""
    found = F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps).unflatten(-1, (heads, -1))
    if rotations is None:
        return found
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.view_as_complex(found.to(wide).unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.view_as_complex(rotations.to(wide)).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).to(dtype)


def check(arguments):
    """At most 1.2 times the error of torch in the same dtype, and two roundings, one of them a whole token's norm."""
    out, dtype = qk_norm_rope(*arguments), arguments[0].dtype
    expected = by_torch(*arguments, torch.float64)
    # The ratio to the error of torch is 0.7 to 1.2.
    assert error(out, expected) <= max(1.2 * error(by_torch(*arguments, dtype), expected), 2 * EPSILON[dtype])
    assert out.dtype == dtype and out.shape == expected.shape and out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(("heads", "channels"), [(1, 2), (3, 24), (5, 30), (12, 128), (2, 160)])
def test_error_is_that_of_torch(heads, channels, rotated, dtype):
    check(case(heads, channels, dtype=dtype, rotated=rotated))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 50), (1, 129)])
def test_tokens(batch, tokens):
    """Tiles with tokens of two batch items, and a partial last tile."""
    check(case(batch=batch, tokens=tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_scales(scale, dtype):
    """The norm cancels the scale, as far as eps and the range of the dtype allow."""
    check(case(dtype=dtype, scale=scale))


def test_zeros():
    arguments = case()
    arguments[0].zero_()
    assert not qk_norm_rope(*arguments).any()


def test_views():
    """The middle third of a projection to queries, keys and values, in a part of a batch."""
    x, *others = case()
    wide = torch.full((3, 7, 3 * x.shape[-1]), float("nan"), device=DEVICE)
    wide[1:, :, 72:144] = x
    assert torch.equal(qk_norm_rope(wide[1:, :, 72:144], *others), qk_norm_rope(x, *others))


def test_writes_into_a_part_of_a_workspace():
    arguments = case()
    workspace = torch.full((2, 20, 3, 24), 7.0, device=DEVICE)
    qk_norm_rope_(workspace[:, 5:12], *arguments)
    assert torch.equal(workspace[:, 5:12], qk_norm_rope(*arguments))
    assert bool((workspace[:, :5] == 7).all()) and bool((workspace[:, 12:] == 7).all())
    torch.library.opcheck(ops.qk_norm_rope_.default, (workspace[:, 5:12], *arguments))
    with pytest.raises(ValueError, match="the heads of out must be contiguous"):
        qk_norm_rope_(torch.empty(2, 7, 3, 48, device=DEVICE)[..., :24], *arguments)


def test_a_gain_of_another_dtype():
    arguments = case(dtype=torch.float16)
    expected = qk_norm_rope(*arguments)
    arguments[1] = arguments[1].float()
    assert torch.equal(qk_norm_rope(*arguments), expected)


@pytest.mark.parametrize("rotated", [True, False])
def test_reference_equals_the_definition(rotated):
    arguments = case(rotated=rotated)
    expected = by_torch(*arguments, torch.float64)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.testing.assert_close(qk_norm_rope_reference(*wide), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
def test_gradients(rotated, dtype):
    arguments = case(dtype=dtype, rotated=rotated)
    outside = randn(2, 7, 3, 24, dtype=dtype, seed=5)
    found = torch.autograd.grad(
        qk_norm_rope(*(inputs := [x.requires_grad_() for x in arguments[:2]]), *arguments[2:]), inputs, outside
    )
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(by_torch(*exact, *arguments[2:], torch.float64), exact, outside.double())
    for actual, right in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        assert error(actual, right) < 4 * EPSILON[dtype]  # 0.3 to 1.7 units


@pytest.mark.parametrize("channels", [24, 128])
@pytest.mark.parametrize("rotated", [True, False])
def test_opcheck(rotated, channels):
    arguments = case(channels=channels, rotated=rotated)
    torch.library.opcheck(ops.qk_norm_rope.default, tuple(arguments))
    torch.library.opcheck(ops.qk_norm_rope.default, (*(x.requires_grad_() for x in arguments[:2]), *arguments[2:]))


def test_compiles_without_graph_breaks():
    arguments = case()
    fused = torch.compile(qk_norm_rope, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(fused(*arguments), qk_norm_rope(*arguments))


def test_refusals():
    x, weight, eps, rotations, heads = case()
    with pytest.raises(ValueError, match=r"weight is \[71\], expected \[72\]"):
        qk_norm_rope(x, weight[1:], eps, rotations, heads)
    with pytest.raises(ValueError, match=r"rotations is \[6, 12, 2\], expected \[7, 12, 2\]"):
        qk_norm_rope(x, weight, eps, rotations[1:], heads)
    with pytest.raises(ValueError, match=r"rotations is torch.float16, expected torch.float32"):
        qk_norm_rope(x, weight, eps, rotations.half(), heads)
    with pytest.raises(ValueError, match="72 channels are not divisible by 5 heads"):
        qk_norm_rope(x, weight, eps, None, 5)
    with pytest.raises(ValueError, match="the last axis of x must be contiguous"):
        qk_norm_rope(x.transpose(1, 2).contiguous().transpose(1, 2), weight, eps, rotations, heads)
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        qk_norm_rope(x.double(), weight, eps, rotations, heads)
    assert why_not_qk_norm_rope(200, 128) == "qk_norm_rope: 25600 channels over all heads; supported: 1 to 16384"
    assert why_not_qk_norm_rope(8, 9) == "qk_norm_rope: 9 channels per head cannot be rotated; use an even number"
    assert why_not_qk_norm_rope(40, 128, torch.bfloat16) is None
