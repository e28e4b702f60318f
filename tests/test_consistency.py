"""`consistency` compared with a teacher whose ODE has a known solution, with streaming, and run as a stage."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import distill_case as case
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from mla_convert.distill.metrics import Metrics
from mla_convert.distill.stages.consistency import Consistency, ConsistencyConfig
from mla_convert.distill.trainer import run_stage
from mla_convert.distill.views import with_weights
from mla_convert.errors import UserError
from mla_convert.flow import denoising_times, sampling_times
from mla_convert.mla.window import CausalConfig

FLOAT32 = 1e-5
SPREAD = 0.5


class Solved:
    """The velocity of Gaussian data around the mean of the text; the solution of its ODE is known."""

    dtype, device, flow_map = torch.float32, torch.device("cpu"), False
    causal = CausalConfig(**case.CAUSAL)

    def __call__(self, x, timestep, text, context=None, context_timestep=None):
        t = (timestep / 1000).view(len(x), 1, -1, 1, 1)
        mean = text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return SimpleNamespace(sample=self.velocity(x, t, mean, ((1 - t) ** 2 * SPREAD**2 + t**2).sqrt()))

    def velocity(self, x, t, mean, sigma):
        """`E[eps - x_0 | x_t]`."""
        return (t - (1 - t) * SPREAD**2) / sigma**2 * (x - (1 - t) * mean) - mean


class SolvedMap(Solved):
    """The end of the path through any point of that ODE: `x_t - (1 - t) mean` grows like sigma."""

    def velocity(self, x, t, mean, sigma):
        end = mean + SPREAD / sigma * (x - (1 - t) * mean)
        return torch.where(t > 0, (x - end) / t.clamp_min(1e-3), torch.zeros_like(x))


def clips(seed=0, number=16):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(number, 1, 12, 2, 2, generator=generator)
    return {"latents": latents, "encoder_hidden_states": torch.randn(number, 3, 4, generator=generator)}


def solved_loss(steps, average=None, guidance=1.0):
    stage = Consistency(case.make_config("consistency", solver_steps=steps, guidance_scale=guidance))
    models = {"teacher": Solved(), "student": SolvedMap(), "average": average or SolvedMap()}
    return stage.loss(models, clips(), torch.Generator().manual_seed(3))[0].item()


def test_the_solution_of_the_ode_is_a_fixed_point():
    # The teacher's Euler step is wrong by O(h^2), squared. Observed: 1.1e-4, 1.2e-5, 9.1e-7.
    losses = [solved_loss(steps) for steps in (24, 48, 96)]
    assert all(coarse > 8 * fine for coarse, fine in itertools.pairwise(losses))

    # A target at another place costs what it is away.
    class Off(SolvedMap):
        def velocity(self, x, t, mean, sigma):
            return super().velocity(x, t, mean, sigma) + 0.3

    assert solved_loss(96, Off()) > 1e3 * losses[-1]
    # With guidance the teacher's ODE is another one. Observed: 4.1e-5.
    assert solved_loss(96, guidance=3.0) > 10 * losses[-1]


@torch.no_grad()
def streamed_loss(stage, student, average, teacher, batch, seed):
    """Chunk by chunk, with histories from a cache of clean chunks."""
    generator = torch.Generator().manual_seed(seed)
    latents, text = batch["latents"], batch["encoder_hidden_states"]
    empty = torch.zeros_like(text)
    noise = torch.randn(latents.shape, generator=generator)
    chunks = student.causal.chunks(latents.shape[2])
    steps, shift, guidance = stage.config.solver_steps, stage.config.timestep_shift, stage.config.guidance_scale
    place = torch.randint(steps, (len(latents), len(chunks)), generator=generator)
    readers = [(teacher, text), (teacher, empty), (average, text), (student, text)]
    caches = [model.init_cache(len(latents), *latents.shape[3:]) for model, _ in readers]

    def ask(reader, x, t):
        model, prompt = readers[reader]
        return model.forward_chunk(x, 1000 * t, prompt, caches[reader])

    total = 0.0
    for number, (start, stop) in enumerate(chunks):
        clean = latents[:, :, start:stop]
        u, u_next = 1 - place[:, number] / steps, 1 - (place[:, number] + 1) / steps
        t, t_next = (shift * a / (1 + (shift - 1) * a) for a in (u, u_next))
        here, there = (a.view(-1, 1, 1, 1, 1) for a in (t, t_next))
        x = (1 - here) * clean + here * noise[:, :, start:stop]
        unguided = ask(1, x, t)
        x_next = x + (there - here) * (unguided + guidance * (ask(0, x, t) - unguided))
        target = x_next - there * ask(2, x_next, t_next)
        total += (x - here * ask(3, x, t) - target).square().sum().item()
        for (model, prompt), cache in zip(readers, caches, strict=True):
            model.forward_chunk(clean, torch.zeros(len(clean)), prompt, cache, write=True)
    return total / latents.numel()


def test_loss_is_chunk_by_chunk_with_a_cache():
    teacher, batch = case.tiny_model().eval(), case.Clips().heldout()
    student, average = case.perturbed(teacher), case.perturbed(teacher, 0.2)
    stage = Consistency(case.make_config("consistency", solver_steps=6, guidance_scale=2.0))
    models = {"student": student, "teacher": teacher, "average": average}
    loss, _ = stage.loss(models, batch, torch.Generator().manual_seed(5))
    expected = streamed_loss(stage, student, average, teacher, batch, 5)
    # Observed: 1.1e-6.
    assert loss.item() == pytest.approx(expected, rel=FLOAT32)
    loss.backward()
    assert all(p.grad is None for model in (teacher, average) for p in model.parameters())


def test_grid():
    stage = Consistency(case.make_config("consistency", solver_steps=48))
    assert torch.equal(stage.grid(), sampling_times(48, 5.0))
    # Four steps lie on the grid of 48, 900 / 1000 does not.
    assert len(Consistency(case.make_config("consistency", denoising_steps=[1000, 750, 500, 250])).grid()) == 49
    grid = Consistency(case.make_config("consistency", denoising_steps=[900, 500])).grid()
    assert len(grid) == 50 and (grid.diff() < 0).all()
    assert (grid - 0.9 * 5 / (1 + 4 * 0.9)).abs().min() < 1e-6
    torch.testing.assert_close(denoising_times((1000, 750, 500, 250), 5.0), sampling_times(4, 5.0))


def test_the_average_is_seen_and_not_copied(tmp_path, monkeypatch):
    seen, loss = [], Consistency.loss

    def watched(self, models, batch, generator):
        average, student = models["average"], models["student"]
        seen.append(average)
        trained = [name for name, p in student.named_parameters() if p.requires_grad]
        for name, parameter in student.named_parameters():
            assert (average.get_parameter(name) is parameter) == (name not in trained)
        return loss(self, models, batch, generator)

    monkeypatch.setattr(Consistency, "loss", watched)
    case.train(tmp_path, stage="consistency", steps=3)
    kept = load_file(tmp_path / "checkpoints" / "step-00000003" / "ema.safetensors")
    assert kept and all(torch.equal(seen[0].get_parameter(name), tensor) for name, tensor in kept.items())


def test_a_view_has_the_weights_in_the_same_memory():
    model = case.tiny_model()
    name = "blocks.0.attn1.to_q.weight"
    weight = torch.zeros_like(model.get_parameter(name))
    view = with_weights(model, {name: weight})
    weight += 1
    assert (view.get_parameter(name) == 1).all() and not (model.get_parameter(name) == 1).any()
    assert view.blocks[0] is not model.blocks[0] and view.proj_out.weight is model.proj_out.weight


@torch.no_grad()
def solve(model, x, text, steps):
    """Euler steps of the ODE of a whole clip, with a history of zeros."""
    context = {"context": torch.zeros_like(x), "context_timestep": torch.zeros(len(x))}
    times = sampling_times(steps, 5.0)
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * model(x, 1000 * t.expand(len(x), x.shape[2]), text, **context).sample
    return x


def test_one_step_comes_closer_to_the_solution(tmp_path):
    teacher, batch = case.tiny_model(), case.Clips().heldout()
    student = case.tiny_model()
    x = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
    text = batch["encoder_hidden_states"]
    expected = solve(teacher, x, text, 48)

    def distance():
        return (solve(student, x, text, 1) - expected).square().mean().item()

    before = distance()
    config = case.make_config(
        "consistency",
        steps=60,
        solver_steps=8,
        guidance_scale=1.0,
        learning_rate=1e-2,
        trainable="all",
        eval_every=None,
    )
    run_stage(config, student, {"teacher": teacher}, case.Clips(), None, tmp_path, 0, 0)
    # Observed: 0.034 to 0.020.
    assert distance() < 0.75 * before


@pytest.mark.parametrize("changes", [{}, {"teacher": "start", "grad_accumulation": 2}])
def test_resume_ends_with_the_same_bytes(tmp_path, changes):
    changes = {"stage": "consistency", "steps": 5, "solver_steps": 6, **changes}
    _, expected = case.train(tmp_path / "whole", **changes)
    with pytest.raises(case.Killed):
        case.train(tmp_path / "resumed", last_clip=8 * changes.get("grad_accumulation", 1) - 1, **changes)
    result, weights = case.train(tmp_path / "resumed", **changes)
    assert result.resumed_from == 3
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_two_processes(tmp_path):
    """Two processes resume bit for bit, and equal one process that accumulates twice as long."""
    changes = {"stage": "consistency", "steps": 4, "checkpoint_every": 2, "solver_steps": 6}
    assert case.two_processes(tmp_path, last_clip=11, **changes) == ["resumed from 2\n"] * 2
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    case.train(tmp_path / "one", grad_accumulation=2, **changes)
    two, one = (Metrics(tmp_path / folder / "metrics.jsonl").rows() for folder in ("whole", "one"))
    # Observed: 0.
    assert [row["loss"] for row in two[1:]] == pytest.approx([row["loss"] for row in one[1:]], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    teacher = case.tiny_model()
    with torch.no_grad():
        teacher.proj_out.weight.fill_(float("nan"))
    config = case.make_config("consistency", steps=2)
    with pytest.raises(UserError, match="stage consistency diverged: loss is nan at step 1"):
        run_stage(config, case.tiny_model(), {"teacher": teacher}, case.Clips(), None, tmp_path, 0, 0)


def test_what_it_refuses(tmp_path):
    config = case.make_config("consistency", steps=1)

    def refused(message, student, networks):
        with pytest.raises(UserError, match=message) as error:
            run_stage(config, student, networks, case.Clips(), None, tmp_path, 0, 0)
        assert "\n" not in str(error.value)

    teacher, expert = case.tiny_model(), case.tiny_model()
    expert.noise_range = (0.5, 1.0)
    refused("consistency needs the network teacher, which this run does not have", case.tiny_model(), {})
    refused(r"needs a model of all noise levels, this one covers \[0.5, 1.0\]", expert, {"teacher": teacher})
    expert.noise_range, expert.flow_map = (0.0, 1.0), True
    refused(
        "cannot train CausalWanTransformer3DModel: a flow map takes few steps already", expert, {"teacher": teacher}
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"ema_decay": None}, {"solver_steps": 1}, {"denoising_steps": [250, 500]}, {"denoising_steps": []}]
)
def test_configuration_is_strict(change):
    with pytest.raises(ValidationError):
        ConsistencyConfig(**{"steps": 1, "learning_rate": 1e-3, "ema_decay": 0.9, **change})


def test_the_average_is_needed():
    with pytest.raises(ValidationError, match="ema_decay"):
        ConsistencyConfig(steps=1, learning_rate=1e-3)
