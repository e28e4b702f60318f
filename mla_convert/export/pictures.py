"""Draws the pictures of a model card: bars and curves of the report as PNG, one sample as a GIF."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import imageio_ffmpeg

from ..charts import INK, LIGHT, PLAIN, STUDENT, layer_bars, noise_axis, png
from ..errors import UserError
from ..families.causal import CausalTransformer
from .evidence import SAMPLES, Evidence

# Drawing functions import Matplotlib: the import is slow, and warns if its cache folder is not writable.
if TYPE_CHECKING:
    from matplotlib.axes import Axes


FIGURES = "figures"
ANIMATION = f"{SAMPLES}/sample.gif"
ANIMATION_SECONDS, ANIMATION_WIDTH, ANIMATION_FPS = 8, 512, 12
_DPI = 144
_STYLE = PLAIN | {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
}


class Picture(NamedTuple):
    """A picture: its path relative to the checkpoint's folder, and a caption."""

    file: str
    caption: str


def draw_pictures(folder: Path, model: CausalTransformer, evidence: Evidence) -> list[Picture]:
    """Draw the pictures of a model and its report into `folder`; equal input gives equal bytes.

    Raises UserError if a sample cannot be read as a video.
    """
    report = evidence.report or {}
    pictures = []

    def add(name: str, caption: str, draw: Any, *data: Any) -> None:
        (folder / FIGURES).mkdir(exist_ok=True)
        with png(folder / FIGURES / name, _STYLE, _DPI) as (axes,):
            draw(axes, *data)
            axes.set_title(caption)
        pictures.append(Picture(f"{FIGURES}/{name}", caption))

    if model.config.get("mla"):
        add("cache_by_layer.png", "Cached scalars per token by layer", _bars, model.row_widths)
    errors = report.get("attention_rel_error")
    if errors and None not in errors:
        percents = [100 * error for error in errors]
        add("error_by_layer.png", "Attention output error by layer", _bars, percents, "%")
    points = [(t, e) for t, e in report.get("velocity_rel_error_by_timestep") or [] if e is not None]
    if points:
        add("error_by_noise.png", "Velocity error by noise level", _error_by_noise, points)
    curve = [row for row in report.get("curves") or [] if row.get("heldout_loss") is not None]
    # A stage that is trained twice starts again at step 0.
    restarts = any(later["step"] <= row["step"] for row, later in itertools.pairwise(curve))
    if len(curve) > 1 and len({row.get("stage") for row in curve}) == 1 and not restarts:
        add("heldout_loss.png", "Held-out loss during distillation", _heldout, curve)
    if evidence.samples:
        _animate(evidence.samples[0], folder / ANIMATION)
        pictures.append(Picture(ANIMATION, "Sample"))
    return pictures


def _bars(ax: Axes, values: Sequence[float], unit: str = "") -> None:
    layer_bars(ax, values, LIGHT[STUDENT])
    _value_axis(ax, unit)


def _error_by_noise(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    ordered = sorted(points)
    ax.plot([t for t, _ in ordered], [100 * e for _, e in ordered], color=LIGHT[STUDENT], marker="o", markersize=4)
    noise_axis(ax)
    _value_axis(ax, "%")


def _heldout(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    # The teacher's loss is not drawn, because the report measured it with other noise.
    ax.plot(
        [row["step"] for row in rows],
        [row["heldout_loss"] for row in rows],
        color=LIGHT[STUDENT],
        marker="o",
        markersize=4,
    )
    ax.set_xlabel("step")
    ax.margins(y=0.2)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _value_axis(ax: Axes, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {unit}".strip()))


def _animate(video: Path, gif: Path) -> None:
    """Write the first seconds of a video as a small looping GIF, which a card shows without a player."""
    palette = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse=dither=bayer:bayer_scale=4"
    scaled = f"fps={ANIMATION_FPS},scale='min({ANIMATION_WIDTH},iw)':-1:flags=area"
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-threads", "1", "-t", str(ANIMATION_SECONDS)),
        *("-i", str(video), "-filter_threads", "1", "-vf", f"{scaled},{palette}"),
        *("-map_metadata", "-1", "-fflags", "+bitexact", "-f", "gif", str(gif)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{video} cannot be read as a video: {reason}")
