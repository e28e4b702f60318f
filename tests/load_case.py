"""A stock transformer on disk, ways to damage it, and the errors that refuse it."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from checkpoint_case import STOCK
from safetensors.torch import load_file, save_file

from mla_convert.errors import UserError
from mla_convert.load import load_source
from mla_convert.load.weights import WEIGHTS


def stock_folder(path: Path) -> Path:
    """A stock transformer folder, as diffusers writes it."""
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(**STOCK).save_pretrained(path)
    return path


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def write_shards(folder: Path, index: str, tensors) -> list[str]:
    """Two shards, of safetensors or of torch.save as the name of their index says; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = Path(index.removesuffix(".index.json")).stem, Path(index.removesuffix(".index.json")).suffix
    shards = [f"{stem}-{number:05}-of-00002{suffix}" for number in (1, 2)]
    names = sorted(tensors)
    parts = [{name: tensors[name].clone() for name in names[part::2]} for part in (0, 1)]
    for shard, part in zip(shards, parts, strict=True):
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / shard)
    weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return shards


def refusal(model, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_source(str(model), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal_tensors(a, b) -> bool:
    return sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)
