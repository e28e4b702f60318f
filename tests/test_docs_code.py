"""README and docs are correct: Python blocks run, commands parse, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mla_convert.cli import app, main
from mla_convert.evaluate.geometry import preset
from mla_convert.recipe.shipped import shipped_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "bash", "sh", "shell", "console")
# Parts of files that another test compares and runs.
FRAGMENTS = {"docs/extending.md": "test_extending.py"}
RECIPE = """
version: 1
name: docs
source:
  model: zoo:digits
data:
  kind: digits
  heldout: 4
convert:
  init: svd
  kv_lora_rank: 28
"""
ASIDE = {"--help", "-h", "--version", "--install-completion", "--show-completion"}


class Block(NamedTuple):
    """Code on a page, and the line it begins at."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """Fenced and indented code."""
    found = []
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            assert token.map
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(page, token.map[0] + 1, language, token.content))
    return found


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "py")]


def spans(page: Path) -> Iterator[tuple[int, Token]]:
    """Line and token of everything in running text: code, links and images."""
    for token in tokens(page):
        for child in token.children or []:
            yield (token.map or [0])[0] + 1, child


def commands(text: str) -> list[list[str]]:
    """The words of every command in a shell block, without comments, pipes and the brackets of a synopsis."""
    found: list[list[str]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(
            re.sub(r"(?<!\S)\[|\](?!\S)", "", line.removeprefix("$ ")), posix=True, punctuation_chars="|&;<>"
        )
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):
                found.append(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return [words for words in found if words]


def arguments(words: list[str]) -> list[str] | None:
    """The arguments that `mla-convert` gets from a command line that starts it; None for other commands."""
    if words[0] == "mla-convert":
        return words[1:]
    if words[0] in ("python", "accelerate", "torchrun") and "mla_convert" in words:
        return words[words.index("mla_convert") + 1 :]
    return None


def options(command: Any) -> set[str]:
    return ASIDE | {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def check_command(words: list[str], whole: bool = True) -> None:
    """Parse a command line without running it; unless it is `whole`, only its command and options.

    Raises ValueError.
    """
    command, context, rest = typer.main.get_command(app), None, list(words)
    label = "mla-convert"
    while True:
        if not whole or ASIDE & set(rest):
            unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options(command)]
            subcommands = getattr(command, "commands", {})
            if not subcommands and unknown:
                raise ValueError(f"{label} has no option {unknown[0]}")
            names = [word for word in rest if not word.startswith("-")]
            if not (subcommands and names):
                return
            if names[0] not in subcommands:
                raise ValueError(f"{label} has no command {names[0]}")
            label, command = names[0], subcommands[names[0]]
            rest.remove(label)
            continue
        try:
            context = command.make_context(label, rest, parent=context)
            if not hasattr(command, "commands"):
                break
            label, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            raise ValueError(f"{label}: {error.format_message()}") from None
    check_names(context.params)


def check_names(values: dict[str, Any]) -> None:
    """Recipes and presets that a command names must exist. Raises ValueError."""
    recipe = values.get("recipe")
    shipped = recipe in shipped_recipes() or (ROOT / str(recipe)).is_file()
    # Names such as RECIPE and my.yaml stand for the reader's own.
    own = recipe and (recipe.isupper() or (recipe.endswith(".yaml") and not recipe.startswith("recipes/")))
    if recipe and not shipped and not own:
        raise ValueError(f"there is no recipe {recipe}")
    if values.get("preset"):
        try:
            preset(values["preset"])
        except Exception as error:
            raise ValueError(str(error)) from None


def check_other(words: list[str]) -> None:
    """Targets of make, scripts and modules must exist. Raises ValueError."""
    if words[0] == "make":
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        missing = [word for word in words[1:] if word not in known and "=" not in word]
    elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
        missing = [] if (ROOT / words[1]).is_file() else [words[1]]
    elif words[:2] == ["python", "-m"] and words[2].startswith("mla_convert"):
        missing = [] if importlib.util.find_spec(words[2]) else [words[2]]
    else:
        missing = []
    if missing:
        raise ValueError(f"there is no {missing[0]}")


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    found, heading = set(), False
    for token in tokens(page):
        if token.type == "inline" and heading:
            text = "".join(child.content for child in token.children or [])
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
        heading = token.type == "heading_open"
    return found


def check_link(page: Path, target: str) -> None:
    """A relative link leads to a file of the repository and to a heading of it. Raises ValueError."""
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    place = (page.parent / path).resolve() if path else page
    if not place.exists():
        raise ValueError(f"{target} does not exist")
    if anchor and place.suffix == ".md" and anchor not in anchors(place):
        raise ValueError(f"{place.name} has no heading {anchor}")


def problems(checks: Iterator[tuple[str, Any, tuple[Any, ...]]]) -> list[str]:
    """One line for every check that fails."""
    found = []
    for place, check, values in checks:
        try:
            check(*values)
        except ValueError as error:
            found.append(f"{place}: {error}")
    return found


def test_there_is_something_to_check() -> None:
    readme = ROOT / "README.md"
    lines = [words for block in blocks(readme) if block.language in SHELL for words in commands(block.code)]
    assert sum(arguments(words) is not None for words in lines) >= 5
    assert len(python_blocks(readme)) >= 2


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page):
    def checks() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        for block in blocks(page):
            for words in commands(block.code) if block.language in SHELL else []:
                given = arguments(words)
                yield (str(block), check_other, (words,)) if given is None else (str(block), check_command, (given,))
        for line, token in spans(page):
            if token.type == "code_inline" and token.content.startswith("mla-convert "):
                for words in commands(token.content):
                    yield f"{name(page)}:{line}", check_command, (words[1:], False)

    assert problems(checks()) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    def checks() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        for line, token in spans(page):
            for target in (token.attrs.get("href"), token.attrs.get("src")):
                if target:
                    yield f"{name(page)}:{line}", check_link, (page, str(target))

    assert problems(checks()) == []


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with a converted digits checkpoint at every path that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "docs.yaml").write_text(RECIPE)
    assert main(["convert", str(folder / "docs.yaml"), "--out", str(folder / "built")]) == 0
    checkpoint = folder / "runs" / "demo" / "checkpoint"
    assert main(["export", str(folder / "built" / "stages" / "00-convert"), str(checkpoint)]) == 0
    for other in ("runs/my", "out"):
        (folder / other).symlink_to(checkpoint.parent if other.startswith("runs") else checkpoint)
    return folder


def needs_more(code: str, folder: Path) -> bool:
    """Whether a block loads something that is neither in `folder` nor created by the block."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained" and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and not (folder / str(first.value)).is_dir():
                return True
    return False


def check_imports(code: str) -> None:
    """Every name that is imported from this package exists. Raises ValueError."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "mla_convert":
            try:
                module = importlib.import_module(str(node.module))
            except ModuleNotFoundError as error:
                raise ValueError(str(error)) from None
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise ValueError(f"{node.module} has no {alias.name}")


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name)
def test_python_runs(page, workspace, monkeypatch):
    """The blocks of a page run in order; from the first that needs the network on, only imports are checked."""
    monkeypatch.chdir(workspace)
    scope: dict[str, Any] = {"__name__": "__main__"}
    offline = name(page) not in FRAGMENTS
    for block in python_blocks(page):
        code = textwrap.dedent(block.code)
        check_imports(code)
        offline = offline and not needs_more(code, workspace)
        if offline:
            exec(compile("\n" * block.line + code, str(page), "exec"), scope)
    if page == ROOT / "README.md":
        assert offline


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mla-convert rnu my.yaml", "No such command 'rnu'"),
        ("mla-convert run my.yaml --outt x", "run: No such option: --outt"),
        ("HF_TOKEN=x mla-convert generate", "generate: Missing"),
        ("accelerate launch -m mla_convert run nothing-like-it", "there is no recipe nothing-like-it"),
        ("mla-convert plan --preset wan3 | less", "wan3"),
        ("mla-convert plan SOURCE [--frames many]  # frames", "--frames"),
        ("mla-convert run recipes/absent.yaml", "there is no recipe recipes/absent.yaml"),
        ("mla-convert recipes cpoy demo", "No such command 'cpoy'"),
    ],
)
def test_wrong_commands_are_found(line, message):
    (words, *_) = commands(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_command(arguments(words))


@pytest.mark.parametrize("line", ["mla-convert run", "mla-convert recipes", "mla-convert --install-completion"])
def test_parts_of_commands_pass(line):
    (words,) = commands(line)
    check_command(words[1:], whole=False)


def test_wrong_parts_are_found(tmp_path):
    with pytest.raises(ValueError, match="run has no option --outt"):
        check_command(["run", "--outt"], whole=False)
    with pytest.raises(ValueError, match="has no command rnu"):
        check_command(["rnu"], whole=False)
    with pytest.raises(ValueError, match="there is no dmeo"):
        check_other(["make", "dmeo"])
    page = ROOT / "README.md"
    for target, message in (("docs/absent.md", "does not exist"), ("docs/export.md#absent", "no heading absent")):
        with pytest.raises(ValueError, match=message):
            check_link(page, target)
    check_link(page, "docs/export.md#two-forms")
    with pytest.raises(ValueError, match="has no absent"):
        check_imports("from mla_convert.files import absent")
    assert needs_more("Model.from_pretrained('owner/name')", tmp_path)
