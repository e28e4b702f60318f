"""Errors stay one short line, however long what they are about is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_case import RECIPE, write_teacher
from safetensors.torch import save_file

from mla_convert.cli import main
from mla_convert.errors import UsageError, few, quoted
from mla_convert.recipe.load import parse_recipe

LONG = "a cat that walks slowly " * 200
# A folder name of pytest's is in some of the lines.
LIMIT = 420


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def refused(capsys: Any, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) in (1, 2)
    err: str = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < LIMIT
    return err


def test_long_values_are_cut_in_their_middle_and_short_ones_are_not() -> None:
    assert quoted("7 up") == "'7 up'"
    assert quoted("x" * 58) == repr("x" * 58)
    cut = quoted("begin " + LONG + " end")
    assert len(cut) <= 60 and cut.startswith("'begin a cat") and cut.endswith(" end'") and " ... " in cut


def test_long_lists_are_counted() -> None:
    assert few(["a"]) == "a" and few([]) == "none" and few("abc") == "a, b, c"
    assert few(str(number) for number in range(1203)) == "0, 1, 2 and 1,200 more"


def test_a_prompt_is_quoted_in_part(capsys: Any, teacher: Path, tmp_path: Path) -> None:
    generate = ["generate", teacher, "-o", tmp_path / "x.mp4"]
    assert "cannot read the digits prompt 'a cat that" in refused(capsys, *generate, "--prompt", LONG)
    assert "unknown direction 'xxx" in refused(capsys, *generate, "--prompt", f"7 moving {'x' * 999}")
    assert "is not a prompt with a time" in refused(capsys, *generate, "--prompt", "7", "--prompt-at", LONG)
    assert "is not a size" in refused(capsys, *generate, "--prompt", "7", "--size", "9" * 9999)


def test_a_file_of_many_tensors_is_named_in_part(capsys: Any, teacher: Path, tmp_path: Path) -> None:
    save_file({f"block.{number}.weight": torch.zeros(1, 2) for number in range(300)}, tmp_path / "many.safetensors")
    generate = ["generate", teacher, "-o", tmp_path / "x.mp4"]
    expected = "block.0.weight [1, 2], block.1.weight [1, 2], block.10.weight [1, 2] and 297 more; a start must be"
    assert expected in refused(capsys, *generate, "--prompt", "7", "--start", tmp_path / "many.safetensors")
    embeds = refused(capsys, *generate, "--prompt-embeds", tmp_path / "many.safetensors")
    assert "it has block.0.weight, block.1.weight, block.10.weight and 297 more" in embeds


def test_a_value_of_a_recipe_is_quoted_in_part() -> None:
    with pytest.raises(UsageError) as error:
        parse_recipe(RECIPE.format(teacher="x"), [f"convert.kv_lora_rank={LONG}"])
    assert "kv_lora_rank: expected" in str(error.value) and len(str(error.value)) < 200
