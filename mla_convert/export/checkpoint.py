"""Writes and loads checkpoints: atomically, and with equal bytes for equal weights."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from .. import registry
from ..errors import UserError
from ..families.causal import CausalTransformer
from ..files import MANIFEST, RUN_STATE, atomic_folder, claim_folder, save_tensors
from ..load import (
    LazyTensors,
    accepted_config,
    build_model,
    check_tensors,
    known_config,
    open_weights,
    read_json,
)
from ..load.hub import is_hub_id
from ..load.locate import zoo_folder
from ..load.weights import CONFIG, INDEX, WEIGHTS
from .config import DEFAULT_SHARD_SIZE
from .manifest import TRANSFORMER, build_manifest, family_of, read_manifest, verify_files
from .run_folder import last_stage


def save_checkpoint(
    model: Any,
    folder: Path,
    manifest: Mapping[str, Any],
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    tensors: LazyTensors | None = None,
) -> None:
    """Write `folder/transformer` and the manifest; `folder` appears complete or not at all.

    `manifest` holds what the caller records (resolved recipe, source); versions, revision, cached scalars and
    digests are added. `tensors` are the weights of a `model` on the meta device: one shard is in memory at a time.

    Raises UserError if `folder` holds something else or the disk is full, ValueError for a converted model that
    the stock class would load.
    """
    claim_checkpoint(folder)
    with atomic_folder(folder) as temporary:
        write_model(model, temporary / TRANSFORMER, max_shard_size, tensors)
        write_manifest(model, temporary, manifest)


def load_checkpoint(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", verify: bool = False
) -> CausalTransformer:
    """Load the dense or converted model from a run, checkpoint or transformer folder, in eval mode.

    `dtype` None keeps the stored dtypes. `verify` compares every file with its digest in the manifest, which must list
    it. Raises UserError in one line.
    """
    root, inner = find_checkpoint(folder)
    if verify:
        verify_files(root, read_manifest(root), inner)
    model_class, config = _described(inner)
    tensors = check_tensors(model_class, config, open_weights(inner), str(inner))
    model: CausalTransformer = build_model(model_class, config, tensors, dtype, device)
    return model


def load_shape(folder: Path, dtypes: bool = True) -> CausalTransformer:
    """The model of `load_checkpoint` on the meta device, in eval mode; only the weights' headers are read.

    Without `dtypes`, the stored dtypes are not read and the weights may be missing. Raises UserError in one line.
    """
    _, inner = find_checkpoint(folder)
    model_class, config = _described(inner)
    with torch.device("meta"):
        model: CausalTransformer = model_class.from_config(config)
    if dtypes:
        tensors = check_tensors(model_class, config, open_weights(inner), str(inner))
        state = {name: tensor.to(tensors.dtype(name)) for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    return model.eval()


def _described(inner: Path) -> tuple[type[Any], dict[str, Any]]:
    """Class and configuration of the model in a transformer folder. Raises UserError."""
    stored = known_config(inner)
    # A standalone checkpoint's own code is not needed here.
    stored.pop("auto_map", None)
    model_class = _model_class(stored.get("_class_name"), inner)
    return model_class, accepted_config(model_class, stored)


def find_checkpoint(folder: Path) -> tuple[Path, Path]:
    """The checkpoint folder and its transformer folder, given either of them, a run or `zoo:NAME`.

    Raises UserError.
    """
    if str(folder).startswith("zoo:"):
        folder = zoo_folder(str(folder))
    for root in (folder, folder / "checkpoint"):
        if (root / TRANSFORMER / CONFIG).is_file():
            return root, root / TRANSFORMER
    if (folder / CONFIG).is_file():
        return (folder.parent if (folder.parent / MANIFEST).is_file() else folder), folder
    # `runs/smal` has the form of a Hub ID, but beside other runs it is a typing error.
    if not folder.exists() and is_hub_id(str(folder)) and not folder.parent.is_dir():
        raise UserError(
            f"{folder} does not exist; a model on the Hub must be downloaded first: "
            f"hf download {folder} --local-dir DIR"
        )
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    if (folder / RUN_STATE).is_file():
        stage = last_stage(folder)
        instead = "" if stage is None else f", or give {stage}"
        raise UserError(
            f"the run in {folder} is not finished and has no checkpoint yet; continue it with `mla-convert run --out "
            f"{folder} --resume`{instead}"
        )
    raise UserError(
        f"{folder} holds no checkpoint: neither {TRANSFORMER}/config.json nor checkpoint/{TRANSFORMER}; give the "
        "folder that `mla-convert run`, `convert` or `export` wrote"
    )


def claim_checkpoint(folder: Path) -> None:
    """Raise UserError unless `folder` is missing, empty or a checkpoint that mla-convert wrote."""
    if (folder / RUN_STATE).exists():
        raise UserError(f"{folder} is a run folder; choose another folder for the checkpoint")
    claim_folder(folder, "checkpoint")


def refuse_stock_loading(model: Any) -> None:
    """Raise ValueError if the stock class could load the tensors of a converted model without an error.

    Loaders raise an error only for a known name with a different shape; for all other differences they only warn.
    """
    family = family_of(type(model))
    if type(model) is not family.mla_class:
        return
    known = inspect.signature(family.dense_class.__init__).parameters
    with torch.device("meta"):
        dense = family.dense_class.from_config({k: v for k, v in model.config.items() if k in known})
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    if not any(tensor.shape != shapes.get(name, tensor.shape) for name, tensor in model.state_dict().items()):
        raise ValueError(f"{type(model).__name__} has no tensor that a stock class refuses by its shape")


def write_model(
    model: Any,
    folder: Path,
    max_shard_size: str,
    tensors: LazyTensors | None = None,
    auto_map: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and the weights into a transformer `folder`; see `save_checkpoint`.

    `auto_map` maps a diffusers auto class to the class in the folder's own code.
    """
    refuse_stock_loading(model)
    model.save_config(folder)
    config = read_json(folder / CONFIG)
    # The path that the model was loaded from and the code it came with are not part of the model.
    for key in ("_name_or_path", "auto_map"):
        config.pop(key, None)
    if auto_map:
        config["auto_map"] = dict(auto_map)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_weights(model, folder, max_shard_size, tensors)


def write_manifest(model: Any, folder: Path, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Write and return the manifest of `model`, whose files are in `folder`."""
    manifest = build_manifest(model, folder, recorded)
    (folder / MANIFEST).write_text(
        json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    return manifest


def _write_weights(model: Any, folder: Path, max_shard_size: str, tensors: LazyTensors | None) -> None:
    """Write the shards and index that `save_pretrained` would write, one shard in memory at a time."""
    state = model.state_dict()
    if tensors is not None:
        # The split into shards needs the dtypes of the stored weights.
        state = {name: tensor.to(tensors.dtype(name)) for name, tensor in state.items()}
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size, filename_pattern=pattern)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: (state if tensors is None else tensors)[name].contiguous() for name in names}
        save_tensors(shard, folder / filename, {"format": "pt"})
        del shard
        if tensors is not None:
            tensors.release()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_class(name: Any, folder: Path) -> type[Any]:
    classes: dict[str, type[Any]] = {}
    for family in registry.families().values():
        classes |= dict.fromkeys(family.source_classes, family.dense_class)
        classes |= {cls.__name__: cls for cls in (family.dense_class, family.mla_class)}
    if name not in classes:
        raise UserError(f"{folder}: cannot load a model of class {name}; supported are {', '.join(classes)}")
    return classes[name]
