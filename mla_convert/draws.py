"""Derive separate random generators from a recipe's seed, one for each use."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Use(IntEnum):
    """The uses of a seed; the comment before each group lists the `numbers` that `drawn` takes for each use.

    The figures in the documentation were drawn with these values. The first three uses of a stage have the same values
    as the first three of a conversion. That is harmless: the draws that noise calibration batch n also shuffle the
    first epoch of stage n. A new use needs a value of its own.
    """

    # Conversion: the batch; the first layer of a latent and the batch; the batch and the probe; the layer.
    CALIBRATION_NOISE = 1
    SAMPLE = 2
    PROJECTION = 3
    INIT = 4
    # Training stage: its index and the epoch; index and micro-batch; index and update; index.
    ORDER = 1
    NOISE = 2
    SHARED = 3
    ADAPTERS = 5
    # Clips that the teacher generates: the shard.
    ROLLOUT = 6
    # The held-out clips of a folder: no numbers.
    SPLIT = 7


def drawn(use: Use, seed: int, *numbers: int) -> torch.Generator:
    """The CPU generator of one use, such as one layer or batch. Trailing zeros in `numbers` change nothing."""
    state = np.random.SeedSequence((use, seed, *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def drawn_seed(use: Use, seed: int, *numbers: int) -> int:
    """A 32-bit seed for one use, with the same arguments as `drawn`."""
    return int(np.random.SeedSequence((use, seed, *numbers)).generate_state(1)[0])
