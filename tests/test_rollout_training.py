"""Rollouts in training equal those of inference, with gradients only where they belong."""

from __future__ import annotations

import copy

import distill_case as case
import pico
import pytest
import torch

from mla_convert.distill.rollout import self_rollout
from mla_convert.flow import sampling_times
from mla_convert.run.stream import stream_chunks

FLOAT32 = 1e-5
TIMES = sampling_times(3, 5.0)
SIZE = (11, 4, 4)


def model_of(layout=None):
    """A pico model whose window of 5 frames has wrapped twice after 11."""
    dense = pico.dense_model()
    model = dense if layout is None else pico.convert(dense, **layout)
    return model.float().requires_grad_(True)


def text(batch=2):
    return torch.randn(batch, 3, 8, generator=torch.Generator().manual_seed(5))


def roll(model, exit_step=2, seed=7, **settings):
    return self_rollout(model, text(), SIZE, TIMES, exit_step, torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
@pytest.mark.parametrize("layout", [None, pico.LAYOUTS[0] | {"own_chunk": "latent"}, pico.LAYOUTS[3]])
def test_with_the_last_exit_step_it_is_the_rollout_of_inference(layout, context_noise):
    model = model_of(layout)
    streamed = stream_chunks(model, text(), *SIZE, 3, 5.0, context_noise, seed=7)
    expected = torch.cat(list(streamed), dim=2)
    # Observed: 0.
    torch.testing.assert_close(roll(model, context_noise=context_noise).detach(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(roll(model, exit_step=1), expected)


def gradients(model, video, first=0, stop=None):
    """Gradients of the mean square of some frames, by parameter."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(video[:, :, first:stop].square().mean(), list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


@pytest.mark.parametrize("exit_step", [0, 2])
def test_a_chunk_has_the_gradient_of_its_exit_step_alone(exit_step):
    """Compared with denoising the last chunk again by hand, with a cache that was filled without gradients."""
    model = model_of(pico.LAYOUTS[0] | {"own_chunk": "latent"})
    video = roll(model, exit_step)
    generator = torch.Generator().manual_seed(7)
    cache = model.init_cache(2, *SIZE[1:])
    for start, stop in model.causal.chunks(SIZE[0]):
        x = torch.randn(2, 2, stop - start, *SIZE[1:], generator=generator)
        with torch.no_grad():
            for step in range(exit_step):
                v = model.forward_chunk(x, 1000 * TIMES[step].expand(2), text(), cache)
                x = x + (TIMES[step + 1] - TIMES[step]) * v
            if stop < SIZE[0]:
                clean = video[:, :, start:stop].detach()
                model.forward_chunk(clean, torch.zeros(2), text(), cache, write=True)
    clean = x - TIMES[exit_step] * model.forward_chunk(x, 1000 * TIMES[exit_step].expand(2), text(), cache)
    expected, found = gradients(model, clean), gradients(model, video, start)
    assert found.keys() == expected.keys()
    # Observed: 0.
    assert max(pico.relative_error(found[name], expected[name]) for name in expected) < FLOAT32


def test_there_is_no_graph_through_the_cache(monkeypatch):
    model, caches = model_of(pico.LAYOUTS[3]), []
    make = type(model).init_cache

    def kept(self, *args, **settings):
        caches.append(make(self, *args, **settings))
        return caches[-1]

    monkeypatch.setattr(type(model), "init_cache", kept)
    video = roll(model)
    assert video.requires_grad and caches
    assert all(not rows.requires_grad and rows.abs().sum() > 0 for rows in caches[0].rows)
    # What writes the cache gets no gradient where a chunk sees itself exactly; what reads it does.
    found = gradients(model, video)
    lacking = {name.rsplit(".", 2)[1] for name, _ in model.named_parameters() if name not in found}
    assert lacking == {"kv_a_proj"}


@pytest.mark.parametrize("layout", [None, pico.LAYOUTS[0] | {"own_chunk": "latent"}])
def test_gradient_checkpointing_changes_nothing(layout):
    """The cache wraps around between a chunk and its recomputation."""
    plain = model_of(layout)
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    checkpointed.train()
    expected, found = (gradients(model, roll(model, 1)) for model in (plain, checkpointed))
    # Observed: 0.
    assert max(pico.relative_error(found[name], expected[name]) for name in expected) < FLOAT32


def test_mixed_precision_loses_no_gradient():
    model = model_of(pico.LAYOUTS[0] | {"own_chunk": "latent"})
    expected = gradients(model, roll(model))
    with torch.autocast("cpu", torch.bfloat16):
        video = roll(model)
    found = gradients(model, video)
    assert found.keys() == expected.keys()
    cosines = [torch.cosine_similarity(found[n].flatten(), expected[n].flatten(), 0).item() for n in expected]
    # Observed: 0.997.
    assert min(cosines) > 0.9


def test_the_gradient_begins_where_it_should():
    model = model_of()
    video = roll(model, gradient_from=6)
    parameters = list(model.parameters())
    found = [
        torch.autograd.grad(part.square().mean(), parameters, allow_unused=True, retain_graph=True)
        for part in (video[:, :, :6], video[:, :, 6:])
    ]
    early, late = (any(grad is not None and grad.any() for grad in grads) for grads in found)
    assert late and not early
    assert torch.equal(video, roll(model))
    with torch.no_grad():
        assert not roll(model).requires_grad


def test_every_draw_comes_from_the_generator():
    model = model_of()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = roll(model, context_noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(roll(model, context_noise=0.1), first)
    assert not torch.equal(roll(model, seed=8, context_noise=0.1), first)


def test_windows_of_training_are_windows_of_inference():
    """Frames beyond the window of the tiny digits model, its sinks included."""
    model, clips = case.tiny_model().eval(), case.Clips().heldout()
    prompts = clips["encoder_hidden_states"]
    with torch.no_grad():
        video = self_rollout(model, prompts, (20, 16, 16), TIMES, 2, torch.Generator().manual_seed(3))
    expected = torch.cat(list(stream_chunks(model, prompts, 20, 16, 16, 3, 5.0, seed=3)), dim=2)
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-6)
