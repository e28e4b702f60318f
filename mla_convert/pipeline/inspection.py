"""Inspects a dense model before its conversion: spectra, rotary pairs and predicted errors; changes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..convert.config import ConvertConfig
from ..convert.initialize import LayerInit, initialize_layer
from ..convert.probe import LayerSample
from ..convert.target import Target, as_read, layout_target
from ..distill.normalization import Latents
from ..distill.progress import Report
from ..errors import UsageError
from ..evaluate.prediction import (
    Prediction,
    default_ranks,
    error_curve,
    layout_config,
    position_error,
    recommend,
    recommend_by_weights,
)
from ..evaluate.spectrum import LayerSpectra, Spectrum, activation_spectrum, gram_spectrum, unrotated_error
from ..evaluate.spectrum_figures import write_figures
from ..files import atomic_folder, check_place, claim_folder, save_tensors, write_json
from ..load import AdapterConfig, Source, load_source
from ..mla.config import Position
from .inspection_clips import ClipRun, Clips, open_clips

INSPECT_JSON, SPECTRA = "inspect.json", "spectra.safetensors"
LAYOUTS: tuple[Position, ...] = get_args(Position)
TRIED: Position = "rotate_on_read"
TOGETHER = 2
SHARED = f"{TRIED}, {TOGETHER} layers a latent"


@dataclass
class _Measured:
    """The measurements of a model; without clips, only the spectra of the weights.

    `trial` is the measured relative velocity error of a trial conversion to `trial_scalars` per token.
    """

    layers: list[LayerSpectra]
    predictions: dict[str, Prediction]
    axes: tuple[int, ...] = ()
    tokens: int = 0
    trial: float | None = None
    trial_scalars: int | None = None


def inspect_source(
    model: str,
    subfolder: str | None,
    data: Path | None,
    clips: int | None,
    text_tokens: int | None,
    ranks: Sequence[int] | None,
    out: Path | None,
    report: Report,
    file: str | None = None,
    use_ema: bool | None = None,
    adapters: Sequence[AdapterConfig] = (),
    latents: Latents = "auto",
) -> dict[str, Any]:
    """Compute everything that `inspect --json` prints, with one layer in memory at a time.

    Clips come from the folder `data`, or are generated for a digits model. Without clips, or with `clips` 0, only
    the weights are inspected. `latents` says what the folder stores; see `data.latents` of a recipe. If `out` is
    given, the result is written there as `inspect.json`, the energies as `spectra.safetensors`, with the figures.
    Raises UserError in one line.
    """
    started = time.monotonic()
    if out is not None:
        claim_folder(out, "folder of inspect", (INSPECT_JSON,))
        check_place(out, folder=True)
    source = load_source(model, subfolder, file=file, use_ema=use_ema, adapters=adapters)
    dense = source.geometry.dense_scalars_per_token
    chosen = sorted(set(ranks or default_ranks(dense)))
    if not 1 <= chosen[0] <= chosen[-1] <= dense:
        wrong = chosen[0] if chosen[0] < 1 else chosen[-1]
        raise UsageError(
            f"--ranks: {wrong} is not between 1 and {dense}, the scalars per token per layer that {model} caches"
        )
    calibration = open_clips(source, data, clips, text_tokens, latents)
    measured = _Measured(_weights(source, report), {})
    seconds = {"weights": time.monotonic() - started}
    if calibration is not None:
        _measure(source, calibration, chosen, measured, report)
        seconds["activations"] = time.monotonic() - started - seconds["weights"]
    result = _result(source, chosen, measured, calibration)
    seconds["total"] = time.monotonic() - started
    result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    if out is not None:
        _write(out.resolve(), result, measured)
    return result


def _weights(source: Source, report: Report) -> list[LayerSpectra]:
    """Compute the spectrum of every layer's stacked `[W_K; W_V]`."""
    layers = source.geometry.num_layers
    spectra = []
    for layer in range(layers):
        prefix = f"blocks.{layer}.attn1"
        weights = (source.tensors[f"{prefix}.{name}.weight"] for name in ("to_k", "to_v"))
        spectra.append(LayerSpectra(gram_spectrum(*weights)))
        source.tensors.release()
        report("weights", layer + 1, layers)
    return spectra


def _measure(source: Source, clips: Clips, ranks: Sequence[int], measured: _Measured, report: Report) -> None:
    """Add the spectra of the activations, the energy of the rotary pairs, and every layout's error by rank.

    The error curves are in the units of the calibration; a trial conversion, measured on clips, gives their scale.
    """
    configs = {layout: layout_config(layout, source.geometry.head_dim) for layout in LAYOUTS}
    run = ClipRun(source, clips)
    measured.axes = run.axes
    curves: dict[str, Tensor] = {}
    together = TOGETHER if source.geometry.num_layers % TOGETHER == 0 else 1
    neighbors: list[tuple[Target, LayerSample]] = []
    plans: dict[int, LayerInit] = {}
    tried = ConvertConfig(position=TRIED, kv_lora_rank=ranks[len(ranks) // 2])

    def visit(layer: int, attention: Any, sample: LayerSample) -> None:
        for layout, config in configs.items():
            fitted, _ = as_read(sample, config)
            target = layout_target(attention, fitted, measured.axes, config)
            curve, energy = error_curve([(target, fitted)])
            curve = curve + position_error(target, fitted)
            curves[layout] = curves[layout] + curve if layout in curves else curve
            if layout == TRIED:
                measured.layers[layer].output = Spectrum(energy)
                neighbors.append((target, fitted))
        if len(neighbors) == together:
            if together > 1:
                # Only as far as the plot shows it.
                curve, _ = error_curve(neighbors, 2 * together * ranks[-1])
                curves[SHARED] = curves[SHARED] + curve if SHARED in curves else curve
            neighbors.clear()
        plans[layer] = initialize_layer(
            attention, sample, measured.axes, tried, tried.ranks(layer + 1)[layer], torch.Generator()
        )
        measured.layers[layer].activations = activation_spectrum(sample)
        lost, total = unrotated_error(sample)
        measured.layers[layer].unrotated = lost
        measured.layers[layer].unrotated_share = float(lost.sum()) / total if total > 0 else 0.0
        measured.tokens = len(sample.hidden)
        report("activations", len(plans), len(measured.layers))

    run.sample(visit, report, together)
    measured.trial = run.velocity_error(tried, plans, report)
    rank = tried.ranks(1)[0]
    expected = float(curves[TRIED][rank])
    scale = measured.trial**2 / expected if expected > 0 else 0.0
    measured.trial_scalars = rank
    measured.predictions = {
        layout: Prediction(config.cached_key, scale * curves[layout]) for layout, config in configs.items()
    }
    if SHARED in curves:
        measured.predictions[SHARED] = Prediction(0, scale * curves[SHARED], together)


def _result(source: Source, ranks: Sequence[int], measured: _Measured, clips: Clips | None) -> dict[str, Any]:
    """The result as plain JSON values; without clips, what needs them is null."""
    geometry = source.geometry
    predicted = {
        layout: {str(scalars): prediction.relative(scalars) for scalars in ranks}
        for layout, prediction in measured.predictions.items()
    }
    if predicted:
        recommendation = recommend(predicted, geometry.dense_scalars_per_token)
    else:
        recommendation = recommend_by_weights([layer.weights for layer in measured.layers], ranks)
    return {
        **source.provenance(),
        "num_layers": geometry.num_layers,
        "num_heads": geometry.num_heads,
        "head_dim": geometry.head_dim,
        "dense_scalars_per_token": geometry.dense_scalars_per_token,
        "ranks": list(ranks),
        "data": clips and {"clips_from": clips.name, "clips": clips.count, "tokens": measured.tokens},
        "layers": [{"layer": n, **layer.row(ranks, measured.axes)} for n, layer in enumerate(measured.layers)],
        "own_chunk": "exact",
        "qk_rope_head_dim": {layout: layout_config(layout, geometry.head_dim).qk_rope_head_dim for layout in LAYOUTS},
        "measured": measured.trial
        and {"position": TRIED, "scalars": measured.trial_scalars, "velocity_rel_error": measured.trial},
        "predicted": predicted or None,
        "recommendation": recommendation,
    }


def _write(out: Path, result: dict[str, Any], measured: _Measured) -> None:
    """Write `inspect.json`, the energies and the figures, all of them or none."""
    energies = {
        f"layers.{number}.{name}": spectrum.energy.contiguous()
        for number, layer in enumerate(measured.layers)
        for name, spectrum in (("weights", layer.weights), ("activations", layer.activations), ("output", layer.output))
        if spectrum is not None
    }
    with atomic_folder(out) as folder:
        write_json(folder / INSPECT_JSON, result)
        save_tensors(energies, folder / SPECTRA)
        write_figures(folder, measured.layers, measured.axes, measured.predictions, result["ranks"])
