"""Runs a dense model on clips for `inspect`: samples every layer and measures a trial conversion."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert.blocks import SourceBlocks, with_attention
from ..convert.calibrate import Visitor, sweep
from ..convert.clips import CalibrationBatch, clip_batches, enter_clips
from ..convert.config import CalibrationConfig, ConvertConfig
from ..convert.initialize import LayerInit
from ..convert.probe import LayerSample
from ..convert.state import latent_attention
from ..convert.store import TensorStore
from ..devices import default_device
from ..distill.data import DigitClips, drawn_rows
from ..distill.latents import LatentShards
from ..distill.normalization import Latents
from ..distill.progress import Report
from ..errors import UsageError
from ..families.image import needed_conditions
from ..load import Source
from ..run.latents import DIGITS, prompt_encoder
from .channels import check_channels

# Clips are batched up to this many tokens.
_TOKENS_PER_PASS = 16384
_TRIAL_CLIPS = 16


@dataclass(frozen=True)
class Clips:
    """Clips by index: `read` gives one of `count` to calibrate on, `read_trial` one of `trial_count` for the trial."""

    name: str
    count: int
    read: Callable[[int], dict[str, Tensor]]
    trial_count: int
    read_trial: Callable[[int], dict[str, Tensor]]


def open_clips(
    source: Source, data: Path | None, clips: int | None, text_tokens: int | None, latents: Latents = "auto"
) -> Clips | None:
    """Open the clips; None if only the weights are inspected. Raises UserError if clips do not fit the model."""
    count = CalibrationConfig().clips if clips is None else clips
    digits = prompt_encoder(source.config) == DIGITS
    if count == 0 or (data is None and not digits):
        if data is None and clips:
            raise UsageError("--clips needs --data FOLDER, the parquet shards to take clips from")
        return None
    if data is None:
        digits_data = DigitClips(seed=0, heldout=_TRIAL_CLIPS)
        held = digits_data.heldout()
        return Clips(
            DIGITS, count, digits_data.example, _TRIAL_CLIPS, lambda index: {k: v[index] for k, v in held.items()}
        )
    shards = LatentShards(data, text_tokens, latents, needed_conditions(source.config), skippable=False)
    # Measured on its own calibration clips a fit looks too good, so the trial has other clips if there are two or more.
    trial_count = min(_TRIAL_CLIPS, max(1, len(shards) // 2))
    first = len(shards) - trial_count
    rows = drawn_rows(len(shards), seed=0)
    opened = Clips(
        str(data),
        min(count, max(1, first)),
        lambda index: shards.read(rows[index]),
        trial_count,
        lambda index: shards.read(rows[first + index]),
    )
    example = opened.read(0)
    check_channels(example, source, str(data))
    height, width = example["latents"].shape[2:]
    down, across = source.config["patch_size"][1:]
    if height % down or width % across:
        raise UsageError(f"{data}: latents of {height}x{width} do not divide into patches of {down}x{across}")
    return opened


class ClipRun:
    """Runs a dense model on clips, one block in memory at a time; `axes` has the axis of each of its rotary pairs."""

    def __init__(self, source: Source, clips: Clips) -> None:
        self.clips, self.blocks = clips, SourceBlocks(source, device=default_device())
        self.axes: tuple[int, ...] = self.blocks.model.rotary_table().axes
        latents = clips.read(0)["latents"]
        rows, columns = self.blocks.model.token_grid(*latents.shape[2:])
        fitting = _TOKENS_PER_PASS // (latents.shape[1] * rows * columns)
        batch_size = max(1, min(CalibrationConfig().batch_size, fitting))
        self.config = CalibrationConfig(clips=clips.count, batch_size=batch_size)

    def sample(
        self, visit: Callable[[int, Any, LayerSample], None], report: Report, layers_per_latent: int = 1
    ) -> None:
        """Call `visit(layer, attention, sample)` for every layer, from the last to the first.

        Raises UserError for clips of only one chunk.
        """
        with tempfile.TemporaryDirectory() as scratch:
            sweep(
                self.blocks,
                enter_clips(
                    self.blocks,
                    self._batches(self.clips.read, self.clips.count),
                    self.config,
                    TensorStore(Path(scratch) / "tokens", device=self.blocks.device),
                ),
                self.config,
                history_only=True,
                wanted=range(len(self.blocks)),
                visitor=_Sampled(visit, report),
                layers_per_latent=layers_per_latent,
            )

    @torch.no_grad()
    def velocity_error(self, config: ConvertConfig, plans: Mapping[int, LayerInit], report: Report) -> float:
        """Relative velocity error of a conversion on the trial clips, with clean history."""
        model, ranks = self.blocks.model, config.ranks(len(self.blocks))
        with tempfile.TemporaryDirectory() as scratch:
            store = TensorStore(Path(scratch) / "tokens", device=self.blocks.device)
            batches = self._batches(self.clips.read_trial, self.clips.trial_count)
            clips = enter_clips(self.blocks, batches, self.config, store)
            for number in range(len(clips)):
                store[_converted(number)] = store[clips.key(0, number)]
            for layer, rank in enumerate(ranks):
                with self.blocks.open(layer) as block:
                    converted = with_attention(block, latent_attention(block.attn1, plans[layer], config, rank))
                    for number, inputs in enumerate(clips.inputs):
                        dense = block(store[clips.key(layer, number)], *inputs.shared)
                        clips.advance(layer, number, dense)
                        store[_converted(number)] = converted(store[_converted(number)], *inputs.shared)
                report("trial", layer + 1, len(ranks))
            error = energy = 0.0
            for number, inputs in enumerate(clips.inputs):
                expected = model.leave(store[clips.key(len(ranks), number)], inputs).double()
                actual = model.leave(store[_converted(number)], inputs).double()
                error += float((actual - expected).square().sum())
                energy += float(expected.square().sum())
        return (error / max(energy, 1e-300)) ** 0.5

    def _batches(self, read: Callable[[int], dict[str, Tensor]], count: int) -> Iterator[CalibrationBatch]:
        return clip_batches(read, range(count), self.config.batch_size)


class _Sampled(Visitor):
    """Passes the attention and the sample of every layer on to `look`."""

    def __init__(self, look: Callable[[int, Any, LayerSample], None], report: Report) -> None:
        self.look, self.report = look, report

    def visit(self, layer: int, block: Any, sample: LayerSample | None) -> None:
        assert sample is not None
        self.look(layer, block.attn1, sample)

    def passed(self, done: int, total: int) -> None:
        self.report("calibrate", done, total)


def _converted(number: int) -> str:
    """Key of batch `number`'s tokens in the converted model."""
    return f"converted-{number:05d}"
