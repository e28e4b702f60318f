"""The starting point of every test: one thread per worker, no network, no display, the same seeds."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# The variables above are read when these are imported.
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in the background, and children that are to be interrupted inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    # Read when Triton is imported: kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.append(str(Path(__file__).parents[1] / "kernels" / "mla-attention" / "tests"))
    from interpreter import patch_language_once

    patch_language_once()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed the global generators, so that a test draws the same numbers alone and in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
