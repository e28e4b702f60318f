"""Help and tables for a terminal of 80 columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from typer.main import get_command

from mla_convert.cli import app, generate, main, vbench
from mla_convert.cli.dry_run import needs_table
from mla_convert.cli.inspect import energy_table, prediction_table
from mla_convert.cli.output import print_result
from mla_convert.cli.panels import in_panels
from mla_convert.evaluate.text import rough_percent
from mla_convert.sizes import GPU_GIGABYTES

RANKS = [64, 128, 192, 224, 256]


def lines(capsys: Any, table: Any) -> list[str]:
    Console(width=80).print(table)
    printed: list[str] = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    return printed


@pytest.fixture
def shown(capsys: Any, monkeypatch: Any) -> Callable[[str], str]:
    """The help of a command in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")

    def shown(command: str) -> str:
        assert main([*command.split(), "--help"]) == 0
        text: str = capsys.readouterr().out
        return text

    return shown


@pytest.mark.parametrize(("command", "panels"), [("generate", generate.PANELS), ("vbench", vbench.PANELS)])
def test_options_are_grouped_and_the_rest_comes_last(
    shown: Callable[[str], str], command: str, panels: Mapping[str, Sequence[str]]
) -> None:
    out = shown(command)
    titles = re.findall("╭─ (.+?) ─", out)
    assert titles[0] == "Arguments" and titles[-1] == "Other" and sorted(titles[1:-1]) == sorted(panels)
    renamed = {"checkout": "vbench", "dimensions": "dimension"}
    for title, names in panels.items():
        start = out.index(f"─ {title} ")
        panel = out[start : out.index("╰", start)]
        assert all(f"--{renamed.get(name, name).replace('_', '-')} " in panel for name in names)
    assert "--json" in out[out.index("─ Other ") :]


GROUP: Any = get_command(app)
COMMANDS = {name: one for name, one in GROUP.commands.items() if name != "recipes"}
COMMANDS |= {f"recipes {name}": one for name, one in GROUP.commands["recipes"].commands.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_cuts_a_word(shown: Callable[[str], str], command: str) -> None:
    """Neither a value, such as <auto|int8> or T,T,..., nor a long word of a description."""
    out = shown(command)
    for line in out.splitlines():
        values = re.sub(r"\[[^]]*\]", "", line)
        assert "…" not in line and values.count("<") == values.count(">"), line
    named = [param.metavar for param in COMMANDS[command].params if param.metavar]
    assert all(metavar in out for metavar in named)


def test_the_options_of_other_commands_stay_where_they_were(shown: Callable[[str], str]) -> None:
    out = shown("evaluate")
    assert "─ Options " in out and "Memory and speed" not in out and "─ Other " not in out


def test_a_panel_of_an_unknown_option_is_an_error() -> None:
    def command(one: int = 0) -> None:
        """A command."""

    with pytest.raises(KeyError):
        in_panels({"Output": ("two",)})(command)


def test_plan_lists_the_gpus_it_knows(capsys: Any) -> None:
    assert main(["plan", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ", ".join(GPU_GIGABYTES) in words


@pytest.mark.parametrize(
    ("share", "text"),
    [(37.04, "3,700 %"), (0.384, "38 %"), (0.00351, "0.35 %"), (1.0, "100 %"), (1e-6, "below 0.01 %"), (0.0, "0 %")],
)
def test_rough_percents_have_no_exponents(share: float, text: str) -> None:
    assert rough_percent(share) == text
    assert rough_percent(float("inf")) == "not finite"


def test_the_tables_of_inspect_have_one_line_a_row(capsys: Any) -> None:
    errors = dict(zip(map(str, RANKS), [None, 37.0, 0.05, 0.02, 0.0035], strict=True))
    layouts = ["decoupled", "derived", "baked", "rotate_on_read", "rotate_on_read, 2 layers a latent"]
    result = {
        "ranks": RANKS,
        "predicted": dict.fromkeys(layouts, errors),
        "data": {"clips": 16, "tokens": 4096},
        "measured": {"scalars": 192, "position": "rotate_on_read", "velocity_rel_error": 37.0},
        "layers": [
            {
                "layer": layer,
                "energy_at": {str(rank): 0.408 for rank in RANKS},
                "energy_at_output": {str(rank): 0.99991 for rank in RANKS},
            }
            for layer in range(2)
        ],
    }
    predicted = lines(capsys, prediction_table(result))
    # Four layouts in one line each, and the fifth in two.
    assert len([line for line in predicted if line.startswith("│")]) == 6
    assert any("rotate_on_read " in line for line in predicted) and not any("…" in line for line in predicted)
    assert any("3,700 %" in line for line in predicted)
    energy = lines(capsys, energy_table(result))
    assert len([line for line in energy if line.startswith("│")]) == 2
    assert energy[-2].count("40.8 / 100") == 5


def test_a_dry_run_names_every_row_once_and_leaves_zeros_out(capsys: Any) -> None:
    memory = {"parameters": 4000, "gradients": 2000, "average": 0, "caches": 0}
    stage = {"stage": "match_velocity", "parameters": 1000, "trained": 500, "steps": 1, "clips": 2, "tokens": 3}
    stage |= {"memory": memory, "memory_bytes": 10**9, "host_bytes": 0, "disk_bytes": 0}
    other = stage | {"stage": "dmd", "memory": memory | {"caches": 7000}}
    result = {"recipe": "x", "launch": {"processes": 1, "sharded": False, "zero": False}, "assumptions": []}
    result |= {"stages": [stage, other], "seconds": None, "memory_bytes": 81 * 10**9}
    shown = lines(capsys, needs_table(result))
    verdict = " ".join(" ".join(line.split()) for line in shown[-5:])
    assert "by this count 141 GB (H200) per GPU is enough, 80 GB (A100 80, H100) is not" in verdict
    rows = [line.split("│")[1:-1] for line in shown if line.startswith("│")]
    labels = [row[0].strip() for row in rows]
    assert len(labels) == len(set(labels)) and {"parameters", "weights", "gradients"} <= set(labels)
    assert "average" not in labels
    assert [cell.strip() for cell in rows[labels.index("caches")]] == ["caches", "-", "7.00 kB"]


def test_a_table_is_cut_only_on_a_terminal(capsys: Any, monkeypatch: Any) -> None:
    table = Table("x" * 60, "y" * 60)
    table.add_row("1" * 60, "2" * 60)
    monkeypatch.delenv("COLUMNS", raising=False)
    print_result(False, {}, table)
    assert "1" * 60 in (out := capsys.readouterr().out) and "2" * 60 in out
    monkeypatch.setenv("COLUMNS", "80")
    print_result(False, {}, table)
    assert max(map(len, capsys.readouterr().out.splitlines())) == 80
