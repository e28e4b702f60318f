"""Find the benchmarks, and select Triton's interpreter on machines without a GPU, before Triton is imported."""

import os
import sys
from pathlib import Path

import torch
from interpreter import patch_language_once

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_language_once()
