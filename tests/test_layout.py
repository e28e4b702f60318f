"""The layout of the repository: imports go one way, files stay small, and the wheel has what users need."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hatchling.build import build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mla_convert"

ORDER = ("mla", "families", "load", "convert", "distill", "export", "run", "evaluate", "recipe", "pipeline", "cli")
# Anyone may import these; they import only each other.
LEAVES = (
    "charts",
    "denoise",
    "devices",
    "draws",
    "dtypes",
    "errors",
    "explain",
    "files",
    "finite",
    "flow",
    "interrupts",
    "lazy",
    "registry",
    "sampling",
    "sizes",
    "zoo.digits.data",
    "zoo.digits.classifier",
    "zoo.natural.clips",
    "zoo.training",
)
# These may import anything; nobody imports them.
SCRIPTS = ("__main__", "zoo.digits.train", "zoo.natural.data", "zoo.natural.train")
# Docstrings only.
EMPTY = ("zoo", "zoo.digits", "zoo.natural")
# Rollouts take their models as arguments; of `run` they import only each other.
NARROW = (
    "run.batch",
    "run.extent",
    "run.failures",
    "run.passes",
    "run.recent",
    "run.rounds",
    "run.shared",
    "run.source",
    "run.stream",
)

MAX_LINES = 500
MAX_WEIGHTS_BYTES = 10_000_000
MAX_OTHER_BYTES = 1_000_000


def unit(module: str) -> str:
    """The entry of ORDER, LEAVES or SCRIPTS that a dotted name below the package falls under; "" is the package."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in (*ORDER, *LEAVES, *SCRIPTS)), module)


def module_name(path: Path, package: Path) -> str:
    """Dotted name of a file, relative to the package."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, package: Path) -> bool:
    path = package.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def from_targets(node: ast.ImportFrom, folder: list[str], package: Path) -> Iterator[str]:
    """What `from x import y` in a module of `folder` imports from the package: y if it is a module, else x."""
    base = node.module.split(".") if node.module else []
    if node.level:
        base = folder[: len(folder) - node.level + 1] + base
    elif base[:1] == ["mla_convert"]:
        base = base[1:]
    else:
        return
    for alias in node.names:
        name = ".".join([*base, alias.name])
        yield name if is_module(name, package) else ".".join(base)


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of the package in a file, at any depth and of any form."""
    folder = list(path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for name in from_targets(node, folder, package):
                yield node.lineno, name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                root, _, name = alias.name.partition(".")
                if root == "mla_convert":
                    yield node.lineno, name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            match node.args[:1]:
                case [ast.Constant(value=str(name))] if name.partition(".")[0] == "mla_convert":
                    yield node.lineno, name.partition(".")[2]


def allowed(module: str, target: str) -> bool:
    """Whether the order lets `module` import `target`; both dotted names below the package."""
    if not target or target in EMPTY:
        return True  # a version, a docstring
    here, there = unit(module), unit(target)
    if module in NARROW:
        return target in NARROW or there in ("mla", *LEAVES)
    if here in SCRIPTS:
        return there not in SCRIPTS
    if here in LEAVES or there in LEAVES:
        return there in LEAVES
    if here == "":
        # Importing the package registers the models; it hands out the pipeline when that is asked for.
        return there in ORDER[: ORDER.index("families") + 1] or target in ("run.pipeline", "run.generator")
    return here in ORDER and there in ORDER and ORDER.index(there) <= ORDER.index(here)


def violations(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package)}:{line}: {module or 'the package'} may not import {target}"
        for path in sorted(package.rglob("*.py"))
        for module in [module_name(path, package)]
        for line, target in imports(path, package)
        if not allowed(module, target)
    ]


def test_every_module_has_a_place_in_the_order():
    known = {"", *EMPTY, *ORDER, *LEAVES, *SCRIPTS}
    modules = {module_name(path, PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert sorted(module for module in modules if unit(module) not in known) == []


def locale_dependent(source: str) -> list[int]:
    """Lines that read or write text in the locale's encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        called, constants = ast.unparse(node.func), [a.value for a in node.args if isinstance(a, ast.Constant)]
        path_method = called.endswith((".read_text", ".write_text"))
        # Path.open has the mode first, the open of other things no constant.
        opened = called == "open" or (called.endswith(".open") and constants and constants[0] in ("a", "r", "w", "x"))
        if path_method or (opened and not any("b" in str(mode) for mode in constants[-1:])):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("path.read_text()", [1]),
        ("path.write_text(text)", [1]),
        ("open(name)", [1]),
        ("path.open('a')", [1]),
        ("path.read_text(encoding='utf-8')", []),
        ("open(name, 'rb')", []),
        ("path.open('rb')", []),
        ("Image.open(path)", []),
        ("write_text(path, text)", []),
    ],
)
def test_what_depends_on_the_locale_is_found(source, expected):
    assert locale_dependent(source) == expected


@pytest.mark.parametrize("folder", ["mla_convert", "docs"])
def test_text_is_utf_8_everywhere(folder):
    found = {str(path): locale_dependent(path.read_text(encoding="utf-8")) for path in (ROOT / folder).rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_imports_go_one_way():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "statement", "target"),
    [
        ("mla/core.py", "from ..families.wan import FAMILY", "families.wan"),
        ("mla/core.py", "from .. import load", "load"),
        ("mla/core.py", "from mla_convert import load", "load"),
        ("mla/core.py", "from mla_convert.load import load_source", "load"),
        ("mla/core.py", "import mla_convert.families.wan as wan", "families.wan"),
        ("mla/core.py", "def late():\n    from ..families import wan", "families.wan"),
        ("mla/core.py", "def late():\n    import mla_convert.cli", "cli"),
        ("mla/core.py", "if TYPE_CHECKING:\n    from ..load import Source", "load"),
        ("mla/core.py", "importlib.import_module('mla_convert.families.wan')", "families.wan"),
        ("mla/core.py", "from ..zoo.digits import train", "zoo.digits.train"),
        ("distill/stages/dmd.py", "from ...run.stream import rollout", "run.stream"),
        ("distill/__init__.py", "from ..export import card", "export"),
        ("run/stream.py", "from ..families.wan import FAMILY", "families.wan"),
        ("run/stream.py", "from .config import GenerateConfig", "run.config"),
        ("pipeline.py", "from .cli import main", "cli"),
        ("errors.py", "from .mla import core", "mla.core"),
        ("zoo/digits/data.py", "from ...mla.core import attend", "mla.core"),
        ("__init__.py", "from .load import load_source", "load"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, statement, target):
    for name in ("cli", "load", "errors", "families/wan", "mla/core", "run/config", "run/stream", "zoo/digits/train"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from .. import errors\nimport torch\n{statement}\n" if "/" in file else f"{statement}\n")

    (found,) = violations(tmp_path)

    assert found.startswith(f"{file}:")
    assert found.endswith(f" may not import {target}")


def test_right_imports_pass(tmp_path):
    (tmp_path / "mla").mkdir()
    (tmp_path / "mla" / "core.py").write_text("from ..errors import UserError\nfrom .rope import rotate\n")
    (tmp_path / "cli.py").write_text("import mla_convert.mla.core\nfrom . import __version__, errors\n")
    (tmp_path / "errors.py").touch()
    assert violations(tmp_path) == []


def test_kernels_is_not_a_package():
    """A package of that name would shadow the `kernels` library that diffusers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_are_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MAX_LINES} == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as pip would build it, opened for reading."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as archive:
        yield archive


def test_wheel_has_every_file_that_the_package_reads(wheel):
    names = set(wheel.namelist())
    kinds = (".py", ".html", ".j2", ".css", ".typed", ".md")
    expected = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.suffix in kinds}
    assert "mla_convert/py.typed" in expected
    assert any(name.endswith(".html.j2") for name in expected)
    assert sorted(expected - names) == []


def test_wheel_has_the_kernels_and_the_table_that_chooses_them(wheel):
    sources = ROOT / "kernels" / "mla-attention" / "torch-ext"
    expected = {path.relative_to(sources).as_posix() for path in sources.rglob("*.py")}
    assert {"mla_attention/__init__.py", "mla_attention/_ops.py", "mla_attention/attend.py"} <= expected
    assert sorted((expected | {"mla_convert/mla/device_costs.json"}) - set(wheel.namelist())) == []


def test_wheel_has_the_recipes(wheel):
    recipes = {f"mla_convert/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {"mla_convert/recipes/demo.yaml", "mla_convert/recipes/bench/digits.yaml"} <= recipes
    assert sorted(recipes - set(wheel.namelist())) == []


TEACHERS = [f"mla_convert/zoo/{name}/teacher/transformer" for name in ("digits", "natural")]


def test_wheel_has_the_teachers_and_the_classifier(wheel):
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    weights = {"mla_convert/zoo/digits/classifier.safetensors", *(f"{t}/{name}" for t in TEACHERS for name in names)}
    assert sorted(weights - set(wheel.namelist())) == []


def test_wheel_has_nothing_else(wheel):
    kinds = (".py", ".html", ".j2", ".css", ".typed", ".md", ".yaml", ".json", ".jsonl", ".safetensors")
    strays = [
        name
        for name in wheel.namelist()
        if not name.startswith(("mla_convert-", "mla_convert/", "mla_attention/"))
        or (name.startswith("mla_convert/") and not name.endswith(kinds))
        or (name.startswith("mla_attention/") and not name.endswith(".py"))
    ]
    assert strays == []


def test_the_teachers_are_the_only_large_files(wheel):
    sizes = {entry.filename: entry.file_size for entry in wheel.infolist()}
    large = {name: size for name, size in sizes.items() if size > MAX_OTHER_BYTES}
    assert sorted(large) == [f"{teacher}/diffusion_pytorch_model.safetensors" for teacher in TEACHERS]
    assert max(large.values()) <= MAX_WEIGHTS_BYTES


def test_wheel_installs_the_command_and_the_license(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "mla-convert = mla_convert.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def third_party(path: Path) -> set[str]:
    """Top-level names of the libraries that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - {"mla_convert", "mla_attention"}


def test_every_library_is_a_declared_dependency(wheel):
    """A library that is only installed as another one's dependency disappears when that one drops it."""
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = [Requirement(line) for line in message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", [])]
    declared = {canonicalize_name(r.name) for r in required if "extra" not in str(r.marker)}
    owners = packages_distributions()
    used = set().union(*(third_party(path) for path in PACKAGE.rglob("*.py")))
    assert [name for name in sorted(used) if declared.isdisjoint(map(canonicalize_name, owners.get(name, [])))] == []


def test_matplotlib_waits_until_something_is_drawn() -> None:
    """It is slow to import, and if its cache is not writable it warns on stderr, even in `generate`."""
    code = "import sys, mla_convert.pipeline.generation, mla_convert.pipeline.run, mla_convert.evaluate.report; "
    code += "print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
