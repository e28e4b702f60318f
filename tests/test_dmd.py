"""`dmd` compared with the scores of two Gaussians and with plain forwards, and run as a stage."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import distill_case as case
import pico
import pytest
import torch
from pydantic import ValidationError
from recipe_case import RECIPE, write_teacher
from safetensors.torch import load_file

from mla_convert.distill.metrics import Metrics
from mla_convert.distill.stages.dmd import DMD, DMDConfig
from mla_convert.distill.trainer import run_stage
from mla_convert.errors import UsageError, UserError
from mla_convert.load import load_dense, load_source
from mla_convert.mla.window import CausalConfig
from mla_convert.pipeline import run, steps
from mla_convert.recipe.load import parse_recipe

FLOAT32 = 1e-5
SHORT = {"stage": "dmd", "denoising_steps": [1000, 500], "critic_updates": 2, "critic_learning_rate": 1e-3}
TEXT = torch.zeros(64, 1, 1)


class Gaussian:
    """The velocity of elements with a normal distribution of mean `mean` and standard deviation `spread`."""

    dtype, device, flow_map = torch.float32, torch.device("cpu"), False

    def __init__(self, mean, spread):
        self.mean, self.spread = mean, spread

    def variance(self, t):
        return (1 - t) ** 2 * self.spread**2 + t**2

    def __call__(self, x, timestep, text, context=None, context_timestep=None):
        t = (timestep / 1000).view(len(x), 1, -1, 1, 1)
        centered = x - (1 - t) * self.mean
        clean = self.mean + (1 - t) * self.spread**2 / self.variance(t) * centered
        noise = t / self.variance(t) * centered
        return SimpleNamespace(sample=noise - clean)

    def score(self, x, t):
        """The gradient of the log density of noisy elements."""
        return -(x - (1 - t) * self.mean) / self.variance(t)


def stage_on(videos, unscored=0, **changes):
    """The stage with `videos` in place of a rollout, whose first `unscored` frames get no gradient."""
    stage = DMD(case.make_config("dmd", guidance_scale=1.0, **changes))
    stage._rollout = lambda student, batch, generator: (videos, unscored)
    return stage


def dmd_gradient(stage, videos, real, fake, seed=3):
    videos.grad = None
    models = {"student": None, "teacher": real, "fake_score": fake}
    loss, logs = stage.loss(models, {"encoder_hidden_states": TEXT[: len(videos)]}, torch.Generator().manual_seed(seed))
    loss.backward()
    return loss.item(), logs


@pytest.mark.parametrize("score_attention", ["causal", "bidirectional"])
def test_gradient_is_the_difference_of_the_scores_of_two_gaussians(score_attention):
    real, fake = Gaussian(1.0, 0.7), Gaussian(-0.5, 1.2)
    videos = torch.randn(4, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dmd_gradient(stage_on(videos, score_attention=score_attention), videos, real, fake)

    generator = torch.Generator().manual_seed(3)
    u = torch.rand(4, generator=generator)
    t = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98).view(-1, 1, 1, 1, 1)
    x_t = (1 - t) * videos.detach() + t * torch.randn(videos.shape, generator=generator)
    # Tweedie: clean = (x_t + t^2 score) / (1 - t).
    real_clean = (x_t + t**2 * real.score(x_t, t)) / (1 - t)
    scores = t**2 / (1 - t) * (fake.score(x_t, t) - real.score(x_t, t))
    expected = scores / (videos.detach() - real_clean).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    error = (videos.grad * videos.numel() - expected).abs().max() / expected.abs().max()
    # Observed: 1.7e-6.
    assert error < FLOAT32


def test_it_moves_a_gaussian_onto_another():
    real, mean = Gaussian(1.0, 0.7), torch.nn.Parameter(torch.tensor(-0.5))
    optimizer, generator = torch.optim.Adam([mean], lr=0.05), torch.Generator().manual_seed(0)
    for step in range(100):
        videos = mean + 0.7 * torch.randn(64, 1, 3, 2, 2, generator=generator)
        stage = stage_on(videos)
        models = {"student": None, "teacher": real, "fake_score": Gaussian(mean.detach(), 0.7)}
        loss, _ = stage.loss(models, {"encoder_hidden_states": TEXT}, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Observed: 1.009.
    assert mean.item() == pytest.approx(1.0, abs=0.05)


def test_the_fake_score_learns_a_gaussian():
    """Its loss is lowest for the Gaussian that the rollouts come from."""
    videos = -0.5 + 1.2 * torch.randn(64, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    stage = stage_on(videos)
    batch = stage.second_batch({"student": None}, {"encoder_hidden_states": TEXT}, torch.Generator())

    def loss(mean, spread):
        models = {"fake_score": Gaussian(mean, spread)}
        return stage.second_loss(models, batch, torch.Generator().manual_seed(3))[0].item()

    best = loss(-0.5, 1.2)
    assert all(loss(mean, spread) > best for mean, spread in [(-0.8, 1.2), (-0.2, 1.2), (-0.5, 0.9), (-0.5, 1.6)])


@pytest.mark.parametrize("score_attention", ["causal", "bidirectional"])
def test_scores_of_a_model_are_those_of_plain_forwards(score_attention):
    """The real score is guided, with its own prompts, and the fake score is not; chunk by chunk, or all at once."""
    real, batch = case.tiny_model().eval(), case.Clips().heldout()
    fake, text = case.perturbed(real, 0.3).eval(), batch["encoder_hidden_states"]
    videos = batch["latents"].clone().requires_grad_()
    stage = stage_on(videos, score_attention=score_attention, timestep_shift=1.0)
    stage.config = stage.config.model_copy(update={"guidance_scale": 2.0})
    models = {"student": None, "teacher": real, "fake_score": fake}
    loss, _ = stage.loss(models, batch, torch.Generator().manual_seed(3))
    loss.backward()

    generator = torch.Generator().manual_seed(3)
    t = torch.rand(len(videos), generator=generator).clamp(0.02, 0.98)
    at = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - at) * videos.detach() + at * torch.randn(videos.shape, generator=generator)

    @torch.no_grad()
    def clean(model, prompt):
        if score_attention == "bidirectional":
            whole = copy.deepcopy(model)
            whole.causal = CausalConfig(num_frames_per_block=16, window_frames=16)
            return x_t - at * whole(x_t, 1000 * t, prompt).sample
        cache, made = model.init_cache(len(x_t), 16, 16), []
        for start, stop in model.causal.chunks(16):
            made.append(model.forward_chunk(x_t[:, :, start:stop], 1000 * t, prompt, cache))
            history = videos.detach()[:, :, start:stop]
            model.forward_chunk(history, torch.zeros(len(x_t)), prompt, cache, write=True)
        return x_t - at * torch.cat(made, dim=2)

    empty = torch.zeros_like(text)
    x_real = clean(real, empty) + 2.0 * (clean(real, text) - clean(real, empty))
    expected = (clean(fake, text) - x_real) / (videos.detach() - x_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    error = (videos.grad * videos.numel() - expected).abs().max() / expected.abs().max()
    # A difference of like figures. Observed: 1.1e-5.
    assert error < 1e-4
    assert all(p.grad is None for model in (real, fake) for p in model.parameters())
    assert real.causal.window_frames == fake.causal.window_frames == 12


def test_windows_to_score():
    causal = case.tiny_model().causal

    def windows(frames, **changes):
        return DMD(case.make_config("dmd", **changes))._windows(causal, frames)

    assert windows(16) == [(0, 16)]
    assert windows(21, score_frames=15) == [(0, 15), (3, 18), (6, 21)]
    # The last chunk of 16 frames is short.
    assert windows(16, score_frames=7) == [(9, 16)]
    assert windows(16, score_frames=8) == windows(16, score_frames=18) == []


def test_a_window_of_a_video_with_an_independent_first_frame_begins_with_one():
    """The scores' chunks of a window, with the first frame alone, are those in which the student made it."""
    student = case.tiny_model()
    student.causal = CausalConfig(**case.CAUSAL, independent_first_frame=True)
    stage, batch = DMD(case.make_config("dmd", rollout_frames=13, score_frames=7)), case.Clips().heldout()
    windows = stage._windows(student.causal, 13)
    assert windows == [(0, 7), (3, 10), (6, 13)]
    chunks = student.causal.chunks(13)
    assert all((start + a, start + b) in chunks for start, _ in windows for a, b in student.causal.chunks(7)[1:])
    videos, unscored = stage._rollout(student, batch, torch.Generator().manual_seed(0))
    assert (videos.shape[2], unscored) == (7, 1)
    (bias,) = torch.autograd.grad(videos[:, :, 1:].sum(), [student.proj_out.bias])
    assert bias.any()


def test_the_window_is_what_is_scored():
    student, batch = case.tiny_model().eval(), case.Clips().heldout()
    changes = {"rollout_frames": 18, "score_frames": 6}

    def rollout(seed, **more):
        stage = DMD(case.make_config("dmd", **changes, **more))
        stage.begin_update(torch.Generator().manual_seed(seed))
        videos, unscored = stage._rollout(student, batch, torch.Generator().manual_seed(0))
        assert unscored == (0 if stage._window_draw < 0.2 and stage.config.score_window == "random" else 3)
        return stage, videos.detach()

    _, last = rollout(0)
    assert last.shape[2] == 6
    whole, _ = rollout(0, score_window="last")
    whole.config = whole.config.model_copy(update={"score_frames": None})
    videos, unscored = whole._rollout(student, batch, torch.Generator().manual_seed(0))
    assert torch.equal(videos[:, :, 12:].detach(), last) and unscored == 0
    drawn = {rollout(seed, score_window="random")[0]._window_draw for seed in range(4)}
    steps = {rollout(seed)[0]._exit_step for seed in range(12)}
    assert len(drawn) == 4 and steps == {0, 1, 2, 3}


def test_the_first_chunk_of_a_moved_window_gets_no_gradient():
    """The loss is the mean over the other frames, and the scores see all of them."""
    real, fake = Gaussian(1.0, 0.7), Gaussian(-0.5, 1.2)
    videos = torch.randn(4, 1, 6, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dmd_gradient(stage_on(videos), videos, real, fake)
    everywhere = videos.grad
    dmd_gradient(stage_on(videos, unscored=3), videos, real, fake)
    assert not videos.grad[:, :, :3].any()
    assert torch.allclose(videos.grad[:, :, 3:], 2 * everywhere[:, :, 3:], rtol=FLOAT32)


@pytest.mark.parametrize("score_window", ["last", "random"])
def test_a_moved_window_is_trained_after_its_first_chunk(score_window):
    """Chunks before the second of the window carry no graph; the video's own first chunk does."""
    student, batch = case.tiny_model(), case.Clips().heldout()
    stage = DMD(case.make_config("dmd", rollout_frames=9, score_frames=6, score_window=score_window))
    for seed in range(6):
        stage.begin_update(torch.Generator().manual_seed(seed))
        videos, unscored = stage._rollout(student, batch, torch.Generator().manual_seed(0))
        moved = score_window == "last" or stage._window_draw >= 0.5
        assert unscored == (3 if moved else 0)
        (first,) = torch.autograd.grad(
            videos[:, :, :3].sum(), [student.proj_out.bias], allow_unused=True, retain_graph=True
        )
        (second,) = torch.autograd.grad(videos[:, :, 3:].sum(), [student.proj_out.bias])
        assert second.any() and (first is None or not first.any()) == moved


def test_both_networks_train(tmp_path):
    result, _ = case.train(tmp_path, steps=12, critic_trainable="attention", **SHORT)
    rows = Metrics(tmp_path / "metrics.jsonl").rows()
    assert result.steps == 12 and [row["step"] for row in rows] == list(range(13))
    losses = [row["fake_score_loss"] for row in rows[1:]]
    # Observed: 2.6 to 2.2.
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    critic, teacher = load_file(tmp_path / "checkpoints" / "step-00000012" / "second.safetensors"), case.tiny_model()
    assert critic.keys() == {name for name, _ in teacher.named_parameters() if ".attn1." in name}
    assert not any(torch.equal(tensor, teacher.get_parameter(name)) for name, tensor in critic.items())


def test_updates_share_their_choices_and_no_clips(tmp_path, monkeypatch):
    seen, rollout = [], DMD._rollout

    def watched(self, student, batch, generator):
        seen.append((self._exit_step, self._window_draw, batch["latents"].numpy().tobytes(), torch.is_grad_enabled()))
        return rollout(self, student, batch, generator)

    monkeypatch.setattr(DMD, "_rollout", watched)
    case.train(tmp_path, steps=2, grad_accumulation=2, **SHORT)
    # Two steps of two critic updates and one of the student, two micro-batches each.
    assert [grad for *_, grad in seen] == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2
    assert [choice[:2] for choice in seen[::2]] == [choice[:2] for choice in seen[1::2]]
    assert len({place for _, place, *_ in seen}) == 6 and len({clip for *_, clip, _ in seen}) == 12


@pytest.mark.parametrize("changes", [{}, {"grad_accumulation": 2, "rollout_frames": 18, "score_window": "random"}])
def test_resume_ends_with_the_same_bytes(tmp_path, changes):
    changes = {**SHORT, "steps": 4, "checkpoint_every": 2, "score_frames": 6, **changes}
    _, expected = case.train(tmp_path / "whole", **changes)
    # Six clips a step and micro-batch: killed among the critic updates of the fourth step.
    with pytest.raises(case.Killed):
        case.train(tmp_path / "resumed", last_clip=19 * changes.get("grad_accumulation", 1), **changes)
    result, weights = case.train(tmp_path / "resumed", **changes)
    assert result.resumed_from == 2
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_two_processes(tmp_path):
    """Two processes resume bit for bit, and equal one process that accumulates twice as long."""
    changes = {**SHORT, "steps": 2, "checkpoint_every": 1, "rollout_frames": 6}
    assert case.two_processes(tmp_path, last_clip=15, **changes) == ["resumed from 1\n"] * 2
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    case.train(tmp_path / "one", grad_accumulation=2, **changes)
    two, one = (Metrics(tmp_path / folder / "metrics.jsonl").rows() for folder in ("whole", "one"))
    for name in ("loss", "fake_score_loss", "grad_norm"):
        # Observed: 0.
        assert [row[name] for row in two[1:]] == pytest.approx([row[name] for row in one[1:]], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    student = case.tiny_model()
    with torch.no_grad():
        student.proj_out.weight.fill_(float("nan"))
    config = case.make_config(steps=2, **SHORT)
    with pytest.raises(UserError, match="stage dmd diverged: fake_score loss is nan at step 1; there is no checkpoint"):
        run_stage(config, student, {"teacher": case.tiny_model()}, case.Clips(), None, tmp_path, 0, 0)


def test_the_fake_score_begins_as_the_teacher_beside_another_real_score(tmp_path, monkeypatch):
    teacher, real = case.tiny_model(), case.tiny_model(seed=1)
    seen = []

    def loss(self, models, batch, generator):
        seen.append({name: next(models[name].parameters()).detach().clone() for name in ("real_score", "fake_score")})
        return second_loss(self, models, batch, generator)

    second_loss = DMD.second_loss
    monkeypatch.setattr(DMD, "second_loss", loss)
    config = case.make_config(**{**SHORT, "steps": 1, "real_score": "real_score", "grad_accumulation": 1})
    networks = {"teacher": teacher, "real_score": real}
    run_stage(config, case.perturbed(teacher), networks, case.Clips(), None, tmp_path, 0, 0)
    assert torch.equal(seen[0]["fake_score"], next(teacher.parameters()))
    assert torch.equal(seen[0]["real_score"], next(real.parameters()))


def test_a_recipe_names_the_real_score(tmp_path, monkeypatch):
    teacher, other = write_teacher(tmp_path / "teacher"), write_teacher(tmp_path / "other", seed=1)
    stage = "{stage: dmd, steps: 1, learning_rate: 1e-6, batch_size: 2, denoising_steps: [1000], critic_updates: 1, "
    stage += "real_score: real_score, tracker: null}"
    overrides = [f"distill=[{stage}]", f"real_score={{model: '{other}'}}"]
    seen = []
    monkeypatch.setattr(steps, "run_stage", lambda *given: seen.append(given[2]) or run_stage(*given))
    run(parse_recipe(RECIPE.format(teacher=teacher), overrides), tmp_path / "run", until="distill")
    (networks,) = seen
    expected = load_dense(load_source(str(other))).state_dict()
    assert list(networks) == ["teacher", "real_score"]
    assert all(torch.equal(value, expected[name]) for name, value in networks["real_score"].state_dict().items())

    pico.dense_model(text_dim=32).save_pretrained(tmp_path / "latents")
    overrides[1] = f"real_score={{model: '{tmp_path / 'latents'}'}}"
    with pytest.raises(UsageError, match=r"real_score: .*latents takes latents of 2 channels, .*teacher of 1"):
        run(parse_recipe(RECIPE.format(teacher=teacher), overrides), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_it_refuses(tmp_path):
    def refused(message, student=None, **changes):
        networks = {"teacher": case.tiny_model()}
        config = case.make_config("dmd", steps=1, **changes)
        with pytest.raises(UserError, match=message) as error:
            run_stage(config, student or case.tiny_model(), networks, case.Clips(), None, tmp_path, 0, 0)
        assert "\n" not in str(error.value)

    other, unbounded = case.tiny_model(), case.tiny_model()
    other.flow_map = True
    unbounded.causal = CausalConfig(num_frames_per_block=3, window_frames=None)
    refused("dmd needs the network real_score, which this run does not have", real_score="real_score")
    refused("dmd cannot train CausalWanTransformer3DModel: a flow map takes few steps already", other)
    refused("needs a finite window; set causal.window_frames", unbounded)
    refused(
        "score_frames: 18 does not fit whole chunks in a rollout of 16 frames; raise rollout_frames", score_frames=18
    )
    absolute = case.tiny_model()
    absolute.causal = CausalConfig(**case.CAUSAL, sink_positions="absolute")
    refused("1500 latent frames are more than the rotary table's 1024 positions", absolute, rollout_frames=1500)
    refused("score_frames: 4 does not fit whole chunks in a rollout of 18 frames", rollout_frames=18, score_frames=4)
    refused("score_frames: 3 is one chunk, and the first chunk of a window that has moved", score_frames=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"critic_updates": 0}, {"score_range": [0.0, 0.98]}, {"denoising_steps": [250, 500]}, {"real_score": "x"}],
)
def test_configuration_is_strict(change):
    with pytest.raises(ValidationError):
        DMDConfig(steps=1, learning_rate=1e-3, **change)


def test_defaults_are_the_published_ones():
    config = DMDConfig(steps=1, learning_rate=2e-6)
    assert (config.critic_updates, config.critic_learning_rate, config.critic_betas) == (5, 4e-7, (0.0, 0.999))
    # `v_text + 3 (v_text - v_neg)` in the public code.
    assert (config.betas, config.guidance_scale, config.timestep_shift) == ((0.0, 0.999), 4.0, 5.0)
    assert (config.denoising_steps, config.score_range) == ((1000, 750, 500, 250), (0.02, 0.98))
