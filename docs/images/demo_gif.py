"""The picture of the README, from a finished demo: `python docs/images/demo_gif.py [RUN]`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from mla_convert.run.video import save_video, side_by_side, to_frames

if __name__ == "__main__":
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    videos = load_file(run / "samples" / "rollouts.safetensors")
    teacher, student = (np.stack([to_frames(v) for v in videos[name]]) for name in ("teacher", "student"))
    frames = side_by_side(teacher, student, ("dense teacher", "converted"))[:32]
    save_video(frames, Path(__file__).parent / "demo.gif", 8)
