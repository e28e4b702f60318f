"""Uses standalone checkpoints as someone without this package would: `python -I alone.py FOLDER...`.

Every folder has a checkpoint `out` and `inputs.safetensors`; the results go to `outputs.safetensors`.
The Hub has the same checkpoint as `owner/FOLDER`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ABSENT = ("mla_convert", "mla_attention", "pydantic")


class Absent:
    """An import hook that makes packages appear absent."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def use(folder: Path) -> None:
    """Load, run, stream, save and load again, and load as part of a pipeline."""
    import torch
    from diffusers import AutoModel, DiffusionPipeline
    from safetensors.torch import load_file, save_file

    def auto(place: Path | str, **where: str) -> torch.nn.Module:
        model = AutoModel.from_pretrained(str(place), trust_remote_code=True, disable_mmap=True, **where)
        assert type(model).__module__.startswith("diffusers_modules.")
        return model

    class Bare(DiffusionPipeline):
        def __init__(self, transformer: torch.nn.Module) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    inputs = load_file(folder / "inputs.safetensors")
    latents, timestep, text = (inputs.pop(key) for key in ("latents", "timestep", "text"))
    model = auto(folder / "out", subfolder="transformer")
    outputs = {"forward": model(latents, timestep, text, **inputs).sample}
    cache = model.init_cache(len(latents), *latents.shape[3:])
    once = {name: value for name, value in inputs.items() if value.ndim == 1}
    for start, stop in model.causal.chunks(latents.shape[2]):
        chunk = (latents[:, :, start:stop], timestep[:, start:stop], text, cache)
        outputs[f"denoise_{start}"] = model.forward_chunk(*chunk, **once)
        outputs[f"write_{start}"] = model.forward_chunk(*chunk, write=True, **once)

    again = folder / "again"
    model.save_pretrained(again)
    reloaded = type(model).from_pretrained(again, disable_mmap=True)
    outputs["saved"] = reloaded(latents, timestep, text, **inputs).sample
    (code,) = (folder / "out" / "transformer").glob("modeling_*.py")
    shutil.copy(code, again)
    outputs["saved_with_code"] = auto(again)(latents, timestep, text, **inputs).sample
    pipeline = Bare.from_pretrained(str(folder / "out"), trust_remote_code=True, disable_mmap=True)
    outputs["pipeline"] = pipeline.transformer(latents, timestep, text, **inputs).sample
    from_hub = auto(f"owner/{folder.name}", subfolder="transformer")
    outputs["hub"] = from_hub(latents, timestep, text, **inputs).sample
    try:
        model.set_kernels("triton")
    except ValueError:
        outputs["kernels_refused"] = torch.ones(1)
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        for name in sys.argv[1:]:
            use(Path(name))
    for name in ABSENT:
        assert name not in sys.modules
