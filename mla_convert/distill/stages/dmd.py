"""Trains the student by distribution matching on its own rollouts: the third stage of Causal Forcing.

Sources: DMD2 (arXiv 2405.14867) for the two scores and their updates, Self Forcing (arXiv 2506.08009) for
the rollout, Causal Forcing (arXiv 2602.02214) for their place in the pipeline. The stage uses only the prompts,
shapes and images of the clips.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ...errors import UserError
from ...flow import Sampler, add_noise, denoising_times, shift_time, to_clean, velocity
from ...mla.conditions import conditions_of, first_frames
from ...mla.window import CausalConfig
from ...sampling import DenoisingSteps
from ..data import Batch, Data
from ..objective import NoisedClips, predict_velocity
from ..rollout import self_rollout
from ..views import face
from .base import TEACHER, Betas, Models, SecondNetwork, Stage
from .guided import GuidedStageConfig, check_few_step, guided_velocity, negative_text

FAKE_SCORE = "fake_score"


class DMDConfig(GuidedStageConfig):
    """Keys of `dmd`, in addition to those of stages with a guided teacher.

    The student rolls out `rollout_frames` frames (null: as many as a clip), which may exceed its window, and caches
    finished chunks at noise level `context_noise`. `sampler` moves from one of `denoising_steps` to the next, by Euler
    steps or new noise; it must be the one that `generate` uses. Scores see `score_frames` of the frames (null: all):
    the `last`, or a `random` window. A window that starts later than the video gives its first chunk no gradient: to
    the scores it is the start of a video, whose first latent Wan's VAE makes of a single frame. With `reencode_first`
    it is one: the video up to the window's first latent is decoded, and its last frame, encoded as an image, takes that
    latent's place.

    `real_score` names the frozen network of the real score: the run's dense `teacher`, or the recipe's `real_score`,
    which may be a larger model. The fake score begins as a copy of the teacher, or with `fake_score: previous` as the
    last stage `dmd` before this one left it, in its training folder. With `score_attention: bidirectional` all frames
    of the scored window see each other; with `causal` every chunk sees the clean chunks before it. `score_range` clamps
    the scores' noise levels after the shift.

    The real score's velocity is `v_neg + guidance_scale (v_text - v_neg)`. Public code of DMD adds its guidance times
    the difference to `v_text`, so its 3 are 4 here.

    The fake score gets `critic_updates` optimizer steps before each of the student's, over `critic_trainable` of its
    parameters; `steps` counts the student's steps.
    """

    # With own_chunk: exact, the projections that write the cache get no gradient.
    partial_gradients = True

    stage: Literal["dmd"] = "dmd"
    betas: Betas = (0.0, 0.999)
    guidance_scale: float = Field(4.0, ge=0)
    denoising_steps: DenoisingSteps = (1000, 750, 500, 250)
    sampler: Sampler = "euler"
    rollout_frames: int | None = Field(None, ge=1)
    context_noise: float = Field(0.0, ge=0, le=1)
    real_score: Literal["teacher", "real_score"] = "teacher"
    fake_score: Literal["teacher", "previous"] = "teacher"
    score_attention: Literal["causal", "bidirectional"] = "causal"
    score_frames: int | None = Field(None, ge=1)
    score_window: Literal["last", "random"] = "last"
    reencode_first: bool = False
    score_range: tuple[float, float] = (0.02, 0.98)
    critic_updates: int = Field(5, ge=1)
    critic_learning_rate: float = Field(4e-7, gt=0)
    critic_betas: Betas = (0.0, 0.999)
    critic_trainable: Literal["attention", "all"] = "all"

    @property
    def rolls_out(self) -> bool:
        return True

    @property
    def reencodes(self) -> bool:
        return self.reencode_first

    def frames_with_graph(self, frames: int) -> int:
        return self.score_frames or self.rollout_frames or frames

    @field_validator("score_range")
    @classmethod
    def _range_is_inside(cls, value: tuple[float, float]) -> tuple[float, float]:
        # At noise level 0 there is nothing to denoise, and at 1 there is no signal.
        if not 0 < value[0] < value[1] < 1:
            raise ValueError(f"score_range must rise, strictly between 0 and 1, not {list(value)}")
        return value


class DMD(Stage[DMDConfig]):
    """The gradient of a rollout x is `(x_fake - x_real) / mean |x - x_real|`, the difference of two scores at x.

    `x_real` and `x_fake` are the clean videos that the guided real score and the fake score predict from x
    plus noise; the mean is over a clip. The fake score learns the student's distribution by flow
    matching on the rollouts.
    """

    name = "dmd"
    config_class = DMDConfig

    def __init__(self, config: DMDConfig) -> None:
        super().__init__(config)
        self._exit_step, self._window_draw = len(config.denoising_steps) - 1, 1.0

    @property
    def networks(self) -> tuple[str, ...]:
        return (self.config.real_score,)

    @property
    def second(self) -> SecondNetwork:
        config = self.config
        return SecondNetwork(
            FAKE_SCORE,
            TEACHER,
            config.critic_updates,
            config.critic_trainable,
            config.critic_learning_rate,
            config.critic_betas,
            config.weight_decay,
            continues=config.fake_score == "previous",
        )

    def check(self, student: Any, networks: Models, data: Data) -> None:
        check_few_step(self.name, student)
        real = networks[self.config.real_score]
        check_few_step(self.name, real)
        if real.config.in_channels != student.config.in_channels:
            raise UserError(
                f"{self.config.real_score} takes latents of {real.config.in_channels} channels, the student makes "
                f"{student.config.in_channels}; choose a real score for the student's latents"
            )
        clip_frames = data.example(0)["latents"].shape[1]
        frames = self.config.rollout_frames or clip_frames
        longest = student.causal.longest(student.rotary_table().max_len)
        if longest is not None and frames > longest:
            raise UserError(
                f"stage dmd: {frames} latent frames are more than the rotary table's {longest} positions; lower "
                "rollout_frames or set causal.sink_positions: window"
            )
        if student.needed_conditions and frames > clip_frames:
            raise UserError(
                f"stage dmd: images are encoded for the {clip_frames} latent frames of a clip, rollout_frames is "
                f"{frames}; lower it or encode longer clips"
            )
        windows = self._windows(student.causal, frames)
        if student.needed_conditions and windows not in ([], [(0, frames)]):
            raise UserError(
                "stage dmd: if a model is conditioned on an image, its scores need the whole rollout; leave "
                "score_frames out"
            )
        if not windows:
            raise UserError(
                f"score_frames: {self.config.score_frames} does not fit whole chunks in a rollout of {frames} frames; "
                "raise rollout_frames or change score_frames"
            )
        if self.config.reencode_first and windows[-1][0] == 0:
            raise UserError(
                "reencode_first: every scored window begins with the video; leave it out, or raise rollout_frames and "
                "set score_frames"
            )
        if any(self._unscored(student.causal, *window) == window[1] - window[0] for window in windows):
            raise UserError(
                f"score_frames: {self.config.score_frames} is one chunk, and the first chunk of a window that has "
                "moved gets no gradient; raise score_frames"
            )

    def begin_update(self, generator: torch.Generator) -> None:
        self._exit_step = int(torch.randint(len(self.config.denoising_steps), (), generator=generator))
        self._window_draw = float(torch.rand((), generator=generator))

    def _windows(self, causal: CausalConfig, frames: int) -> list[tuple[int, int]]:
        """Ranges of `score_frames` frames, chunked as a video of that length, whose chunks end where a rollout's do.

        With an independent first frame, a window that has moved begins with the last frame of a chunk.
        """
        length = self.config.score_frames or frames
        ends, stops = ({stop for _, stop in causal.chunks(count)} for count in (length, frames))
        starts = range(frames - length + 1)
        return [(start, start + length) for start in starts if {start + end for end in ends} <= stops]

    @staticmethod
    def _unscored(causal: CausalConfig, start: int, stop: int) -> int:
        """How many first frames of a window get no gradient: those of its first chunk, unless it is the video's."""
        return 0 if start == 0 else causal.chunks(stop - start)[0].stop

    def _rollout(self, student: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """What scores see of a rollout for the prompts of `batch`, `[B, C, F', H, W]`, and its `_unscored` frames."""
        config, (frames, height, width) = self.config, batch["latents"].shape[2:]
        windows = self._windows(student.causal, config.rollout_frames or frames)
        chosen = int(self._window_draw * len(windows)) if config.score_window == "random" else -1
        start, stop = windows[chosen]
        unscored = self._unscored(student.causal, start, stop)
        videos = self_rollout(
            student,
            batch["encoder_hidden_states"],
            (stop, height, width),
            denoising_times(config.denoising_steps, config.timestep_shift),
            self._exit_step,
            generator,
            context_noise=config.context_noise,
            sampler=config.sampler,
            gradient_from=start + unscored,
            conditions=conditions_of(batch),
        )
        scored = videos[:, :, start:]
        if start and config.reencode_first:
            assert self.image_latent is not None
            scored = torch.cat([self.image_latent(videos[:, :, : start + 1].detach()), scored[:, :, 1:]], dim=2)
        return scored, unscored

    def _noised(self, model: Any, videos: Tensor, batch: Batch, generator: torch.Generator) -> NoisedClips:
        """`videos` with one noise level per clip, as inputs of a score `model`."""
        low, high = self.config.score_range
        t = shift_time(torch.rand(len(videos), generator=generator), self.config.timestep_shift).clamp(low, high)
        noise = torch.randn(videos.shape, generator=generator).to(videos)
        t = t.to(videos).unsqueeze(1).expand(-1, videos.shape[2])
        conditions = first_frames(model, conditions_of(batch), videos.shape[2])
        text, x_t = batch["encoder_hidden_states"], add_noise(videos, noise, t)
        clips = NoisedClips(x_t, t, text, velocity(videos, noise), conditions=conditions)
        if self.config.score_attention == "bidirectional":
            return clips
        return clips._replace(context=videos, t_context=torch.zeros(len(videos), device=videos.device))

    def _scorer(self, model: Any, frames: int) -> Any:
        """`model` with the attention that `score_attention` chooses."""
        if self.config.score_attention == "causal":
            return model
        view = face(model)
        view.causal = CausalConfig(num_frames_per_block=frames, window_frames=None)
        return view

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, text = self.config, batch["encoder_hidden_states"]
        videos, unscored = self._rollout(models["student"], batch, generator)
        frames = videos.shape[2]
        with torch.no_grad():
            clips = self._noised(models[FAKE_SCORE], videos.detach(), batch, generator)
            negative = negative_text(self.negative, text)
            v_real = guided_velocity(
                self._scorer(models[config.real_score], frames), clips, negative, config.guidance_scale
            )
            v_fake = predict_velocity(self._scorer(models[FAKE_SCORE], frames), clips)
            real, fake = (to_clean(clips.x_t, v, clips.t) for v in (v_real, v_fake))
            distance = (videos - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            gradient = (fake - real) / distance.clamp_min(1e-8)
        # The gradient of 0.5 |scored - (scored.detach() - gradient)|^2 is `gradient`, up to the mean's 1 / numel.
        scored = videos[:, :, unscored:]
        loss = 0.5 * F.mse_loss(scored, scored.detach() - gradient[:, :, unscored:])
        return loss, {"score_difference": (fake - real).abs().mean(), "real_distance": distance.mean()}

    def second_batch(self, models: Models, batch: Batch, generator: torch.Generator) -> Batch:
        videos, _ = self._rollout(models["student"], batch, generator)
        return {**batch, "latents": videos}

    def second_loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        videos = batch["latents"]
        clips = self._noised(models[FAKE_SCORE], videos, batch, generator)
        v = predict_velocity(self._scorer(models[FAKE_SCORE], videos.shape[2]), clips)
        return F.mse_loss(v, clips.target), {}


STAGE = DMD
