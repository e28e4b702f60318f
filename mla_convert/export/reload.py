"""Loads an exported checkpoint as a user would and compares it with the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..errors import UserError
from ..families.causal import CausalTransformer
from ..files import save_tensors
from ..mla.window import Chunk

_SCRIPT = Path(__file__).with_name("isolated.py")


def check_tensors_on_disk(model: Any, transformer: Path) -> None:
    """Load the transformer folder with the class of `model`. Raises UserError if a tensor differs."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # diffusers warns about the key `auto_map`, which AutoModel needs, and shows a bar of its own.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        reloaded = type(model).from_pretrained(transformer, dtype=model.dtype).state_dict()
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    for name, tensor in model.state_dict().items():
        other = reloaded.get(name)
        if other is None or not torch.equal(other.to(tensor.dtype), tensor.cpu()):
            raise UserError(f"tensor {name} differs after reloading from {transformer.parent}; nothing was written")


def check_standalone(model: Any, folder: Path) -> None:
    """Load a standalone checkpoint in a process without this package, and compare a short rollout.

    Raises UserError unless the rollouts agree bit by bit.
    """
    probe = probe_rollout(model)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "names": sorted(model.state_dict()),
        "chunks": probe_chunks(model),
    }
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.safetensors"
        save_tensors(probe, expected, {"settings": json.dumps(settings)})
        run = subprocess.run(
            [sys.executable, "-I", str(_SCRIPT), str(folder.resolve()), str(expected)],
            cwd=scratch,
            # diffusers copies the imported code here, so it is removed with the scratch folder.
            env={**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise UserError(f"the standalone form does not work without this package ({last}); nothing was written")


def probe_chunks(model: CausalTransformer) -> list[Chunk]:
    """The first two chunks of a rollout."""
    return model.causal.chunks(2 * model.causal.num_frames_per_block)[:2]


@torch.no_grad()
def probe_rollout(model: CausalTransformer) -> dict[str, Tensor]:
    """Inputs and outputs of a rollout of two chunks on a small latent, for comparisons.

    Keys: `hidden_states` `[1, C, F, H, W]`, `timestep` `[1, F]`, `encoder_hidden_states` `[1, L, text_dim]`,
    `velocity_0` and `velocity_1`. Empty for models that do not take the inputs of text-to-video.
    """
    config = model.config
    keys = ("in_channels", "text_dim", "patch_size")
    if any(config.get(key) is None for key in keys) or config.get("image_dim") is not None:
        return {}
    chunks = probe_chunks(model)
    frames = chunks[-1].stop
    sides = [2 * side for side in (config.get("compressed_patch_size") or config["patch_size"])[1:]]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, config["in_channels"], frames, *sides, generator=generator).to(model.dtype),
        "timestep": torch.linspace(900, 100, frames).unsqueeze(0),
        "encoder_hidden_states": torch.randn(1, 4, config["text_dim"], generator=generator).to(model.dtype),
    }
    cache = model.init_cache(1, *sides)
    outputs = {}
    for index, (start, stop) in enumerate(chunks):
        chunk = inputs["hidden_states"][:, :, start:stop], inputs["timestep"][:, start:stop]
        outputs[f"velocity_{index}"] = model.forward_chunk(*chunk, inputs["encoder_hidden_states"], cache, write=True)
    return {name: tensor.contiguous() for name, tensor in {**inputs, **outputs}.items()}
