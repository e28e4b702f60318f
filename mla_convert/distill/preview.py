"""Writes previews of the student during a stage: rollouts as one picture, on disk and in the trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..files import atomic_file
from .data import Batch
from .keys import PreviewConfig
from .trackers import log_picture

PREVIEWS = "previews"


class Picture(Protocol):
    """Rolls out `student` for the prompts of the held-out clips and returns the strip, uint8 `[H, W, 3]`.

    Guidance steers away from the negative prompt `[L, D]`, or from zeros if it is None. The implementation is in a
    higher package, beside the rollout of `generate`. Every process calls it.
    """

    def __call__(
        self, student: Any, config: PreviewConfig, heldout: Batch, negative: Tensor | None, /
    ) -> NDArray[np.uint8]: ...


def show_preview(accelerator: Accelerator, work_dir: Path, strip: NDArray[np.uint8], step: int) -> None:
    """Write `previews/step-00000100.png` and show it in the trackers."""
    if not accelerator.is_main_process:
        return
    with atomic_file(work_dir / PREVIEWS / f"step-{step:08d}.png") as temporary:
        Image.fromarray(strip).save(temporary, format="PNG")
    log_picture(accelerator, strip, step)
