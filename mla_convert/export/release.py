"""Exports a checkpoint in its final form and data type, with evidence and card, and verifies it by loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import MANIFEST, atomic_folder
from ..load import read_config, read_json
from .card import render_card
from .checkpoint import TRANSFORMER, claim_checkpoint, find_checkpoint, load_checkpoint, write_manifest, write_model
from .components import AUTO_CLASS, find_components, write_components
from .config import ExportConfig
from .evidence import find_evidence, write_evidence
from .manifest import family_of, read_manifest
from .pictures import draw_pictures
from .reload import check_standalone, check_tensors_on_disk
from .same_run import of_same_run
from .standalone import bundle


def export(
    checkpoint: Path,
    out: Path,
    config: ExportConfig,
    recipe: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a verified checkpoint to `out` in its final form, with its evidence and a model card.

    `recipe`, dumped, replaces the recorded recipe of the checkpoint. The files are loaded and compared before `out`
    appears: tensor by tensor and, for the standalone form, also with a short rollout in a process without this
    package.

    A checkpoint of the same run in `out` is replaced, one of another run or source only with `replace`.

    Returns path, class, form, dtype and bytes. Raises UserError in one line; an existing `out` then stays unchanged.
    """
    root, inner = find_checkpoint(checkpoint)
    claim_checkpoint(out)
    if not (root / MANIFEST).is_file():
        raise UserError(
            f"{checkpoint} has no {MANIFEST}; export a checkpoint that `mla-convert run` or `convert` wrote"
        )
    source_folder, target = root.resolve(), out.resolve()
    if source_folder.is_relative_to(target) or target.is_relative_to(source_folder):
        raise UserError(f"{out} overlaps the checkpoint {root}; choose another output folder")
    if not replace:
        _check_same_run(root, out)
    recorded = read_manifest(root) | ({} if recipe is None else {"recipe": dict(recipe)})
    evidence = find_evidence(root)
    reads_images = read_config(inner).get("image_dim") is not None
    components = find_components(recorded.get("source"), config.components, reads_images)
    model = load_checkpoint(root, config.torch_dtype, verify=True)
    source = _standalone_source(model) if config.form == "standalone" else None
    code = f"modeling_mla_{family_of(type(model)).name}" if source else None
    with atomic_folder(out) as folder:
        auto_map = {AUTO_CLASS: f"{code}.{type(model).__name__}"} if code else None
        write_model(model, folder / TRANSFORMER, config.max_shard_size, auto_map=auto_map)
        if source:
            (folder / TRANSFORMER / f"{code}.py").write_text(source, encoding="utf-8")
        write_components(folder, components, model, code, recorded.get("recipe"))
        write_evidence(folder, evidence, recorded.get("recipe"))
        pictures = draw_pictures(folder, model, evidence)
        manifest = write_manifest(model, folder, {**recorded, "form": config.form})
        check_tensors_on_disk(model, folder / TRANSFORMER)
        if source:
            check_standalone(model, folder)
        card = render_card(manifest, evidence, pictures, components, model.needed_conditions)
        (folder / "README.md").write_text(card, encoding="utf-8")
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {
        "path": str(out),
        "class": type(model).__name__,
        "form": config.form,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": written,
    }


def _check_same_run(root: Path, out: Path) -> None:
    """Raise UserError if `out` holds a checkpoint of another run, source or layout than the one in `root`."""
    if (out / MANIFEST).is_file() and not of_same_run(read_manifest(root), read_json(out / MANIFEST)):
        raise UserError(f"{out} holds a checkpoint of another run; choose another folder, or --force to replace it")


def _standalone_source(model: Any) -> str:
    """The source of a file that defines the class of `model`. Raises UserError if it cannot be bundled."""
    try:
        return bundle(type(model))
    except ValueError as error:
        raise UserError(f"{type(model).__name__} has no standalone form: {error}") from None
