"""Draws the plots of `inspect` as PNG files: spectra, 99 % ranks, rotary pairs, predicted error."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..charts import (
    INK,
    LIGHT,
    MUTED,
    RULE,
    STEPS,
    STUDENT,
    STYLE,
    TEACHER,
    label_ends,
    layer_axis,
    percent_axis,
    png,
    ticks_at,
)
from .prediction import Prediction
from .spectrum import AXES, LEVEL, LayerSpectra, Spectrum

# Drawing functions import Matplotlib: the import is slow, and warns if its cache folder is not writable.
_LAYOUT_COLORS = ("#9a4b00", "#7a5aa8", "#c28a1f", LIGHT[STUDENT], "#2f6b3a")
_SOURCES = {"weights": "weights", "activations": "keys, values", "output": "output"}
_TITLES = {
    "weights": "energy of the weights [W_K; W_V]",
    "activations": "energy of the keys and values",
    "output": "energy of the keys and values as the output sees it",
}
_SOURCE_COLORS = {"weights": LIGHT[TEACHER], "activations": "#7a5aa8", "output": LIGHT[STUDENT]}
_PANEL, _WIDE, _DPI = (5.4, 3.6), (6.8, 3.6), 150
_STYLE = STYLE | {"axes.titlesize": 11, "axes.titlecolor": INK}


def write_figures(
    folder: Path,
    layers: Sequence[LayerSpectra],
    axes: Sequence[int],
    predictions: Mapping[str, Prediction],
    ranks: Sequence[int],
) -> None:
    """Write all plots that have data into `folder`; `axes` is the axis of each rotary pair."""
    spectra = {"weights": [layer.weights for layer in layers]}
    spectra["activations"] = [layer.activations for layer in layers if layer.activations is not None]
    spectra["output"] = [layer.output for layer in layers if layer.output is not None]
    _energy(folder / "spectrum_weights.png", spectra, ("weights",), ranks)
    _rank99(folder / "rank99.png", spectra)
    if predictions:
        _energy(folder / "spectrum_activations.png", spectra, ("activations", "output"), ranks)
        unrotated = [layer.unrotated for layer in layers if layer.unrotated is not None]
        _rope_pairs(folder / "rope_pairs.png", unrotated, axes)
        _predicted_error(folder / "predicted_error.png", predictions, ranks)


def _energy(path: Path, spectra: Mapping[str, Sequence[Spectrum]], names: Sequence[str], ranks: Sequence[int]) -> None:
    """Plot the share of energy kept by number of directions, one line per layer."""
    from matplotlib import colormaps

    with png(path, _STYLE, _DPI, _PANEL, len(names)) as panels:
        for ax, name in zip(panels, names, strict=True):
            layers = spectra[name]
            shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(layers)))
            for layer, (spectrum, shade) in enumerate(zip(layers, shades, strict=True)):
                kept = 100 * spectrum.energy.cumsum(0) / spectrum.energy.sum().clamp_min(1e-300)
                label = f"layer {layer}" if layer in (0, len(layers) - 1) else None
                ax.plot(range(1, len(kept) + 1), kept, color=shade, linewidth=1.5, label=label)
            ax.axhline(100 * LEVEL, color=LIGHT[MUTED], linewidth=1, dashes=(5, 3))
            for rank in ranks:
                ax.axvline(rank, color=LIGHT[RULE], linewidth=1, zorder=0.5)
            ax.set_title(_TITLES[name])
            ax.set_xlabel("directions")
            ax.set_xscale("log")
            last = max(len(spectrum.energy) for spectrum in layers)
            ax.set_xlim(1, last)
            ticks_at(ax, [1, *ranks, last])
            percent_axis(ax)
            ax.set_ylim(0, 100)
            ax.legend(frameon=False, loc="lower right")


def _rank99(path: Path, spectra: Mapping[str, Sequence[Spectrum]]) -> None:
    """Plot the number of directions that hold 99 % of the energy, by layer."""
    from matplotlib.ticker import MaxNLocator

    ends = []
    with png(path, _STYLE, _DPI, _PANEL) as (ax,):
        for name, layers in spectra.items():
            if layers:
                color, counts = _SOURCE_COLORS[name], [spectrum.rank() for spectrum in layers]
                ax.plot(counts, color=color, marker="o", markersize=4)
                ends.append((counts[-1], _SOURCES[name], color))
        ax.set_title(f"directions that hold {100 * LEVEL:g} % of the energy")
        layer_axis(ax)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        ax.set_ylim(0, 1.05 * len(spectra["weights"][0].energy))
        label_ends(ax, ends)


def _rope_pairs(path: Path, unrotated: Sequence[Tensor], axes: Sequence[int]) -> None:
    """Plot each rotary pair's share of the loss of a layer without rotation; rows are layers, columns pairs."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    shares = torch.stack([lost / lost.sum().clamp_min(1e-300) for lost in unrotated]).numpy()
    with png(path, _STYLE, _DPI, _PANEL) as (ax,):
        image = ax.imshow(100 * shares, aspect="auto", cmap="viridis", norm=PowerNorm(0.5, vmin=0))
        ax.grid(False)
        bounds = [0, *(p for p in range(1, len(axes)) if axes[p] != axes[p - 1]), len(axes)]
        for start, stop in itertools.pairwise(bounds):
            ax.axvline(start - 0.5, color="white", linewidth=1.5)
            ax.annotate(
                AXES[axes[start]], ((start + stop - 1) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", color=LIGHT[MUTED],
            )  # fmt: skip
        ax.set_title("loss if a pair is not rotated, as a share of the layer's", pad=20)
        ax.set_xlabel("rotary pair")
        ax.set_ylabel("layer")
        ax.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        ax.figure.colorbar(image, ax=ax, format="%g %%")


def _predicted_error(path: Path, predictions: Mapping[str, Prediction], ranks: Sequence[int]) -> None:
    """Plot the predicted relative velocity error by cached scalars, one line per layout."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    last = 2 * max(ranks)
    ends = []
    with png(path, _STYLE, _DPI, _WIDE) as (ax,):
        for (layout, prediction), color in zip(predictions.items(), _LAYOUT_COLORS, strict=False):
            points = [(scalars, prediction.relative(scalars)) for scalars in range(1, last + 1)]
            shown = [(scalars, 100 * error) for scalars, error in points if error is not None]
            if shown:
                ax.plot(*zip(*shown, strict=True), color=color)
                ends.append((shown[-1][1], layout.replace(", ", ",\n"), color))
        for rank in ranks:
            ax.axvline(rank, color=LIGHT[RULE], linewidth=1, zorder=0.5)
        ax.set_title("predicted velocity error before training")
        ax.set_xlabel("cached scalars per token per layer")
        ax.set_xlim(0, last)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        ax.yaxis.set_minor_locator(NullLocator())
        ticks_at(ax, [0, *ranks, last])
        label_ends(ax, ends)
