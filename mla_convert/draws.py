"""Which random draws belong to which use of a recipe's seed."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Use(IntEnum):
    """What a draw is for; the numbers that go with it follow the name.

    The figures in the documentation were drawn with these numbers. The first three uses of a stage have those of a
    conversion's first three, which is harmless: what calibration batch n is noised with shuffles the first epoch of
    stage n. A new use takes a number of its own.
    """

    # Of a conversion: the batch; the first layer of a latent and the batch; the batch; the layer.
    CALIBRATION_NOISE = 1
    SAMPLE = 2
    PROJECTION = 3
    INIT = 4
    # Of a stage: the stage and the epoch; twice the stage and the micro-batch or the update; the stage.
    ORDER = 1
    NOISE = 2
    SHARED = 3
    ADAPTERS = 5
    # Of the clips that the teacher makes: the shard.
    ROLLOUT = 6
    # Of a folder of clips: which are held out.
    SPLIT = 7


def drawn(use: Use, seed: int, *numbers: int) -> torch.Generator:
    """CPU generator of one use: of a layer, of a batch. Zeros at the end of `numbers` change nothing."""
    state = np.random.SeedSequence((use, seed, *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def drawn_seed(use: Use, seed: int, *numbers: int) -> int:
    """A seed of 32 bits for one use, on the terms of `drawn`."""
    return int(np.random.SeedSequence((use, seed, *numbers)).generate_state(1)[0])
