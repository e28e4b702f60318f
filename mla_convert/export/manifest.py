"""Writes and reads `mla_convert.json`: a checkpoint's model, its origin and the digest of every file.

Equal weights from the same code give equal bytes, because neither time nor machine is recorded.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import UserError
from ..families.base import Family, attention_geometry
from ..files import MANIFEST, sha256
from ..load import read_json
from ..load.pickles import PICKLES
from .evidence import BENCH, PAGE, RECIPE, REPORT, SAMPLES
from .pictures import FIGURES

FORMAT = 1
TRANSFORMER = "transformer"
# Files beside the model. Their digests are recorded but not verified, because they may be measured again.
EVIDENCE = (RECIPE, REPORT, PAGE, BENCH, FIGURES, SAMPLES)
_LIBRARIES = ("torch", "diffusers", "safetensors", "huggingface_hub", "transformers", "accelerate")
_PACKAGE = Path(__file__).parents[1]


def build_manifest(model: Any, folder: Path, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of `model`, whose files are in `folder`; `recorded` is what the caller adds (recipe, source).

    `files` has the digests of the model's files, `evidence` those of its evidence.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    digests = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    evidence = {name: digest for name, digest in digests.items() if name.partition("/")[0] in EVIDENCE}
    return {
        **{key: value for key, value in recorded.items() if key != "evidence"},
        **({"evidence": evidence} if evidence else {}),
        "format": FORMAT,
        "versions": versions(),
        "git_revision": git_revision(),
        "model": describe_model(model),
        "files": {name: digest for name, digest in digests.items() if name not in evidence},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest in `folder`. Raises UserError if it is missing, unreadable or of another format."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "update mla-convert"
        )
    return manifest


def recorded_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe in the manifest of the checkpoint in `folder`; {} without manifest or recipe.

    Raises UserError for a manifest that cannot be read.
    """
    recipe = read_manifest(folder).get("recipe") if (folder / MANIFEST).is_file() else None
    return recipe or {}


def recorded_section(folder: Path, section: str) -> dict[str, Any]:
    """A section of `recorded_recipe(folder)`; {} if there is none."""
    return recorded_recipe(folder).get(section) or {}


def verify_files(folder: Path, manifest: Mapping[str, Any], inner: Path) -> None:
    """Compare the digests of the model's files. Raises UserError with the first file that differs.

    No weights, index or configuration may be in the transformer folder `inner` without being listed: loading might
    prefer it.
    """
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, though {MANIFEST} lists it; export it again")
        if sha256(folder / name) != digest:
            raise UserError(f"{folder / name} has changed: its sha256 differs from {MANIFEST}; export it again")
    for file in sorted(inner.glob("*")):
        name = file.relative_to(folder).as_posix()
        known = name in manifest["files"] or name in (MANIFEST, *EVIDENCE)
        if file.suffix in (".json", ".safetensors", *PICKLES) and not known:
            raise UserError(f"{file} is not listed in {MANIFEST}, so nothing vouches for it; remove it")


def family_of(model_class: type[Any]) -> Family:
    """The family of a dense or converted class. Raises ValueError if there is none."""
    family: Family
    for family in registry.families().values():
        if model_class in (family.dense_class, family.mla_class):
            return family
    raise ValueError(f"{model_class.__name__} belongs to no registered family")


def describe_model(model: Any) -> dict[str, Any]:
    """The geometry, and the cached scalars per token: by layer, their mean, and those of the dense model."""
    family = family_of(type(model))
    geometry = attention_geometry(model.config)
    causal = model.causal
    layers: list[int] = model.row_widths
    dense, latent = geometry.dense_scalars_per_token, sum(layers) / len(layers)
    return {
        "class": type(model).__name__,
        "family": family.name,
        "num_layers": geometry.num_layers,
        "num_heads": geometry.num_heads,
        "head_dim": geometry.head_dim,
        "causal": causal.model_dump(mode="json"),
        "mla": model.config.get("mla"),
        "dense_scalars_per_token": dense,
        "latent_scalars_per_token": latent,
        "layer_scalars_per_token": layers,
        "reduction": 1 - latent / dense,
    }


def versions() -> dict[str, str]:
    """The versions of Python, this package and the libraries that the bytes depend on."""
    from .. import __version__

    installed = {library: version(library) for library in _LIBRARIES}
    return {"python": platform.python_version(), "mla_convert": __version__, **installed}


def git_revision() -> str | None:
    """The commit of this package's git checkout, `-dirty` with local changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed package may be inside another project's checkout, untracked.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
