"""Loads a standalone checkpoint without this package and compares it with the expected tensors.

Runs as a script in a separate process, `python -I isolated.py CHECKPOINT EXPECTED`, which blocks imports of this
package. It imports nothing from the package itself, and raises if something differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ABSENT = ("mla_convert", "mla_attention", "pydantic")


class Absent:
    """Import hook that hides the packages in ABSENT."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def compare(folder: Path, expected: Path) -> None:
    """Load `folder`/transformer with `AutoModel` and compare it with the file `expected`, bit by bit.

    The file's tensors are the inputs and outputs of a rollout, or none. Its metadata holds the tensor names, the
    dtype, the chunks and the number of threads. Raises AssertionError in one line.
    """
    import torch
    from diffusers import AutoModel
    from safetensors import safe_open

    with safe_open(expected, framework="pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    torch.set_num_threads(settings["threads"])
    model = AutoModel.from_pretrained(
        str(folder),
        subfolder="transformer",
        trust_remote_code=True,
        dtype=getattr(torch, settings["dtype"]),
        disable_mmap=True,
    )
    state = model.state_dict()
    if sorted(state) != settings["names"]:
        raise AssertionError("the standalone class has other tensors")
    if "hidden_states" not in tensors:
        return
    latents, timestep, text = (tensors[key] for key in ("hidden_states", "timestep", "encoder_hidden_states"))
    cache = model.init_cache(len(latents), *latents.shape[3:])
    with torch.no_grad():
        for index, (start, stop) in enumerate(settings["chunks"]):
            chunk = (latents[:, :, start:stop], timestep[:, start:stop], text)
            if not torch.equal(model.forward_chunk(*chunk, cache, write=True), tensors[f"velocity_{index}"]):
                raise AssertionError(f"chunk {index} of a rollout differs")


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    compare(Path(sys.argv[1]), Path(sys.argv[2]))
