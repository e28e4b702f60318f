"""A standalone checkpoint includes its class in one file, which works without this package."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
import toy_family
from hub_server import HubServer
from pico import WAN, WINDOW, inputs
from safetensors.torch import load_file, save_file

from mla_convert import registry
from mla_convert.cli import main
from mla_convert.errors import UserError
from mla_convert.export import release, without_kernels
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.release import export
from mla_convert.export.standalone import bundle
from mla_convert.mla.config import MLAConfig
from mla_convert.mla.window import CausalConfig

FAMILIES = ("wan", "anyflow_far", "skyreels_v2")
SHARED = {"rope_pairs": [[0, 2, 4], [0, 2, 4]], "nope_pairs": [[1, 3, 5], [1, 3, 5]]}
# Two layers of two heads of twelve channels, another layout for each family.
LAYOUTS: dict[str, dict[str, Any]] = {
    "wan": {
        "position": "derived",
        "own_chunk": "exact",
        "key_mean": True,
        "kv_lora_rank": [9, 9],
        "layers_per_latent": 2,
        **SHARED,
    },
    "anyflow_far": {"position": "baked", "own_chunk": "latent", "rope_pairs": [[0], [0, 1]], "nope_pairs": [[2], [3]]},
    "skyreels_v2": {"position": "decoupled", "own_chunk": "exact", "q_lora_rank": 5, **SHARED},
}
FRAMES = 6
# What a family is conditioned on beside timestep and text.
EXTRAS = {"anyflow_far": {"r_timestep": torch.zeros(2, FRAMES)}, "skyreels_v2": {"fps": torch.tensor([0, 1])}}
STANDALONE = ExportConfig(form="standalone")


def converted(family: str) -> Any:
    """A converted model with random weights, biases and gains."""
    torch.manual_seed(0)
    model = registry.families()[family].mla_class(
        **WAN,
        **({"inject_sample_info": True} if family == "skyreels_v2" else {}),
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        causal=WINDOW | {"window_frames": 9},
        mla={"v_head_dim": 12, "kv_lora_rank": [9, 7]} | LAYOUTS[family],
    )
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Standalone checkpoints of all families; `export` itself compares the first, the tests compare all."""
    root = tmp_path_factory.mktemp("standalone")
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            if folders:
                patch.setattr(release, "check_standalone", lambda model, folder: None)
            folders[family] = root / family
            save_checkpoint(converted(family), root / family / "saved", {})
            export(root / family / "saved", root / family / "out", STANDALONE)
            latents, timestep, text = inputs(2, FRAMES, 8, 8)
            tensors = {"latents": latents, "timestep": timestep, "text": text, **EXTRAS.get(family, {})}
            save_file(tensors, root / family / "inputs.safetensors")
    return folders


@pytest.fixture(scope="module")
def alone(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Their results in a separate environment with the libraries but without this package."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = Path(__file__).with_name("alone.py")
    python = environment(elsewhere / "venv")
    hub = HubServer()
    for family, folder in written.items():
        out = folder / "out"
        files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        hub.create(f"owner/{family}", files=files)
    run = subprocess.run(
        [str(python), "-I", str(script), *map(str, written.values())],
        cwd=elsewhere,
        env={**os.environ, **hub.environment(str(elsewhere / "home"))},
        capture_output=True,
        text=True,
        check=False,
    )
    hub.shutdown()
    hub.server_close()
    assert run.returncode == 0, run.stderr
    return {family: load_file(folder / "outputs.safetensors") for family, folder in written.items()}


def environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment that has the libraries of this one.

    An editable package is installed as a .pth file, which the new environment does not follow.
    """
    builder = venv.EnvBuilder(symlinks=os.name != "nt")
    builder.create(folder)
    python = Path(builder.ensure_directories(folder).env_exe)
    scheme = {"base": str(folder), "platbase": str(folder)}
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    inner = Path(sysconfig.get_path("purelib", vars=scheme))
    (inner / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return python


def imported(source: str, name: str) -> ModuleType:
    """A separate module made from `source`."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(source, f"{name}.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_the_installed_class(family, written, alone):
    """Bit by bit: forward, streaming, after saving and reloading, in a pipeline, and from the Hub."""
    folder, outputs = written[family], alone[family]
    model = load_checkpoint(folder / "out", verify=True)
    assert type(model).__name__ == registry.families()[family].mla_class.__name__
    latents, timestep, text = inputs(2, FRAMES, 8, 8)
    extras = EXTRAS.get(family, {})
    expected = model(latents, timestep, text, **extras).sample
    for name in ("forward", "saved", "saved_with_code", "pipeline", "hub"):
        assert torch.equal(outputs[name], expected)
    assert "kernels_refused" in outputs
    once = {name: value for name, value in extras.items() if value.ndim == 1}
    cache = model.init_cache(2, 8, 8)
    for start, stop in model.causal.chunks(FRAMES):
        chunk = (latents[:, :, start:stop], timestep[:, start:stop], text, cache)
        assert torch.equal(outputs[f"denoise_{start}"], model.forward_chunk(*chunk, **once))
        assert torch.equal(outputs[f"write_{start}"], model.forward_chunk(*chunk, write=True, **once))


@pytest.mark.parametrize("family", FAMILIES)
def test_code_of_the_card_streams_every_family(family, written):
    card = (written[family] / "out" / "README.md").read_text()
    assert 'pip install "torch' in card
    *_, loading, streaming = re.findall(r"(?s)```python\n(.*?)```", card)
    names: dict[str, Any] = {}
    exec(loading.replace("PATH_OR_REPOSITORY", str(written[family] / "out")), names)
    exec(streaming, names)
    assert names["velocity"].shape == names["latents"].shape
    assert names["cache"].frames_seen == names["frames"]


def test_code_runs_only_when_it_is_trusted(written):
    with pytest.raises(ValueError, match="contains custom code"):
        diffusers.AutoModel.from_pretrained(str(written["wan"] / "out"), subfolder="transformer")


def test_installed_class_reads_it_without_the_code(written):
    inner = written["wan"] / "out" / "transformer"
    assert type(diffusers.MLAWanTransformer3DModel.from_pretrained(inner)) is diffusers.MLAWanTransformer3DModel
    # What is written from there is a checkpoint without code again.
    save_checkpoint(diffusers.MLAWanTransformer3DModel.from_pretrained(inner), written["wan"] / "installed", {})
    assert "auto_map" not in (written["wan"] / "installed" / "transformer" / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_needs_torch_and_diffusers_alone(family, written):
    (path,) = (written[family] / "out" / "transformer").glob("*.py")
    assert path.name == f"modeling_mla_{family}.py"
    tree = ast.parse(path.read_text())
    libraries = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            libraries.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            libraries |= {alias.name.partition(".")[0] for alias in node.names}
    assert libraries - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_the_files_pass_the_linter(written):
    paths = [str(folder / "out" / "transformer") for folder in written.values()]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F,E4,E7,E9", *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_license_of_another_package_stays(tmp_path, monkeypatch):
    source = "# Copyright somebody\n# SPDX-License-Identifier: MIT\n\n\nclass Model:\n    size = 1\n"
    (tmp_path / "odd_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_module", raising=False)
    written = bundle(importlib.import_module("odd_module").Model)
    section = (
        "# From odd_module.\n#\n# Copyright somebody\n# SPDX-License-Identifier: MIT\n\n\nclass Model:\n    size = 1\n"
    )
    assert written.endswith(section)


def test_dense_and_foreign_classes_can_be_bundled():
    for model_class in (registry.families()["wan"].dense_class, toy_family.MLAToyTransformer3DModel):
        module = imported(bundle(model_class), f"bundled_{model_class.__name__}")
        assert getattr(module, model_class.__name__).forward_chunk.__module__ == module.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stand_in_has_what_the_file_uses_of_kernels(family):
    text = bundle(registry.families()[family].mla_class)
    uses = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in uses if ast.unparse(node.value).rpartition(".")[2] == "kernels"}
    assert {"attention", "forget", "takes"} <= used
    stand_in = without_kernels.Kernels()
    assert not [name for name in sorted(used) if not hasattr(stand_in, name)]


CONFIGS = [
    (CausalConfig, {}),
    (CausalConfig, {"window_frames": None, "sink_frames": 2}),
    (CausalConfig, {"num_frames_per_block": 1, "independent_first_frame": True, "sink_positions": "absolute"}),
    (CausalConfig, {"num_frames_per_block": 0}),
    (CausalConfig, {"num_frames_per_block": 3, "window_frames": 4, "sink_frames": 2}),
    (CausalConfig, {"window": 3}),
    (CausalConfig, {"sink_positions": "relative"}),
    (CausalConfig, {"sink_frames": None}),
    *((MLAConfig, {"v_head_dim": 12, "kv_lora_rank": [9, 7]} | layout) for layout in LAYOUTS.values()),
    (MLAConfig, {"v_head_dim": 12, **LAYOUTS["wan"], "kv_lora_rank": [9]}),
    (MLAConfig, {"v_head_dim": 12, **LAYOUTS["wan"], "kv_lora_rank": [9, 7]}),
    (MLAConfig, {"v_head_dim": 12, **LAYOUTS["wan"], "layers_per_latent": 0}),
    (MLAConfig, {"v_head_dim": 12, **LAYOUTS["wan"], "own_chunk": "latent"}),
    (MLAConfig, {"v_head_dim": 12, **LAYOUTS["skyreels_v2"], "kv_lora_rank": [0, 9]}),
    (MLAConfig, {**LAYOUTS["wan"]}),
    (MLAConfig, {"v_head_dim": "x", **LAYOUTS["wan"]}),
    (MLAConfig, {"v_head_dim": 12, **LAYOUTS["wan"], "kv_lora_rank": 9}),
]


@pytest.mark.parametrize(("config", "values"), CONFIGS)
def test_configurations_accept_and_refuse_the_same_without_pydantic(config, values):
    module = imported(bundle(registry.families()["wan"].mla_class), "bundled_configs")
    plain = getattr(module, config.__name__)
    try:
        expected = config(**values)
    except ValueError:
        with pytest.raises(ValueError, match=r"\w"):
            plain(**values)
        return
    found = plain(**values)
    for mode in ("python", "json"):
        assert found.model_dump(mode=mode) == expected.model_dump(mode=mode)
    assert found == plain(**values) and hash(found) == hash(plain(**values))
    with pytest.raises(ValueError, match="frozen"):
        found.sink_frames = 1


def test_export_compares_the_standalone_form(tmp_path, monkeypatch):
    """A file that computes something else is detected, and nothing is written."""
    save_checkpoint(converted("wan"), tmp_path / "saved", {})
    source = bundle(registry.families()["wan"].mla_class)
    wrong = source.replace("self.scale = head_dim**-0.5", "self.scale = 1.0")
    assert wrong != source
    monkeypatch.setattr(release, "bundle", lambda model_class: wrong)
    with pytest.raises(UserError, match="of a rollout differs"):
        export(tmp_path / "saved", tmp_path / "out", STANDALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


MODULES = {
    "clash": "from .one import same\nfrom .two import other\n\n\nclass Model:\n    uses = same, other\n",
    "foreign": "import scipy\n\n\nclass Model:\n    uses = scipy\n",
    "late": "class Model:\n    def run(self):\n        from .one import same\n        return same\n",
    "whole": "from . import one\n\n\nclass Model:\n    uses = one.same\n",
    "renamed": "from .one import same as this\n\n\nclass Model:\n    uses = this\n",
    "looped": "for index in range(3):\n    pass\n\n\nclass Model:\n    uses = index\n",
    "twice": "size = 1\nsize = size + 1\n\n\nclass Model:\n    uses = size\n",
    "raised": "size = 1\nsize += 1\n\n\nclass Model:\n    uses = size\n",
    "filled": "sizes = []\nsizes.append(1)\n\n\nclass Model:\n    uses = sizes\n",
    "stored": "sizes = [0]\nsizes[0] = 1\n\n\nclass Model:\n    uses = sizes\n",
    "tried": "try:\n    from .one import same\nexcept ImportError:\n    pass\n\n\nclass Model:\n    uses = same\n",
    "one": "def same():\n    return helper()\n\n\ndef helper():\n    return 1\n",
    "two": "def other():\n    return helper()\n\n\ndef helper():\n    return 2\n",
}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("clash", "both have a helper"),
        ("foreign", "imports scipy"),
        ("late", "imports odd_package.one"),
        ("whole", "imports one from odd_package.one under another name or as a module"),
        ("renamed", "under another name"),
        ("looped", "line 1 uses index outside its definition"),
        ("twice", "line 2 uses size outside its definition"),
        ("raised", "line 2 uses size outside its definition"),
        ("filled", "line 2 uses sizes outside its definition"),
        ("stored", "line 2 uses sizes outside its definition"),
        ("tried", "line 1 uses same outside its definition"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tmp_path, monkeypatch, module, reason):
    package = tmp_path / "odd_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, source in MODULES.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("odd_package", *(f"odd_package.{name}" for name in MODULES)):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=reason):
        bundle(importlib.import_module(f"odd_package.{module}").Model)


def test_a_class_that_cannot_be_bundled_is_one_clear_line(tmp_path, monkeypatch):
    def fail(model_class):
        raise ValueError("Model in odd_package imports scipy, which a standalone file cannot")

    save_checkpoint(converted("wan"), tmp_path / "saved", {})
    monkeypatch.setattr(release, "bundle", fail)
    with pytest.raises(UserError, match=r"MLAWanTransformer3DModel has no standalone form: .* imports scipy"):
        export(tmp_path / "saved", tmp_path / "out", STANDALONE)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(release, "check_standalone", lambda model, folder: None)
    save_checkpoint(converted("wan"), tmp_path / "saved", {})
    asked = ["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--standalone", "--components", "none"]
    assert main([*asked, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["form"], result["class"]) == ("standalone", "MLAWanTransformer3DModel")
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    reference = {"AutoModel": "modeling_mla_wan.MLAWanTransformer3DModel"}
    assert config["auto_map"] == index["auto_map"] == reference
    assert index["transformer"] == ["modeling_mla_wan", "MLAWanTransformer3DModel"]
