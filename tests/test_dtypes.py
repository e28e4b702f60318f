"""Options and recipe keys of data types take the same names and refuse others in the same words."""

from __future__ import annotations

import pytest
from recipe_case import RECIPE

from mla_convert.cli import main
from mla_convert.cli.options import dtype_parser
from mla_convert.errors import UsageError
from mla_convert.evaluate.bench import BenchConfig
from mla_convert.recipe.load import parse_recipe

TEXT = RECIPE.format(teacher="zoo:digits")
EXPECTED = "expected 'float32', 'bfloat16' or 'float16', got 'half'"


@pytest.mark.parametrize(("short", "full"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_short_names_stand_for_torchs(short: str, full: str) -> None:
    recipe, same = (parse_recipe(TEXT, [f"source.dtype={name}", f"export.dtype={name}"]) for name in (short, full))
    assert recipe == same and recipe.sha256() == same.sha256()
    assert recipe.source.dtype == recipe.export.dtype == full
    assert dtype_parser("--dtype")(short) == BenchConfig(dtype=short).dtype == full


def test_rollouts_take_short_names() -> None:
    rollouts = "data={kind: rollouts, heldout: 1, rollouts: {clips: 2, prompts: ['7'], dtype: bf16}}"
    found = parse_recipe(TEXT, [rollouts]).data.rollouts
    assert found is not None and found.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "y.mp4", "--prompt", "7", "--dtype", "half"], f"--dtype: {EXPECTED}"),
        (
            ["generate", "x", "y.mp4", "--vae-dtype", "fp16"],
            "--vae-dtype: expected 'float32' or 'bfloat16', got 'fp16'",
        ),
        (["export", "x", "y", "--dtype", "half"], f"--dtype: {EXPECTED}"),
        (["bench", "--dtype", "half"], f"--dtype: {EXPECTED}"),
        (["plan", "zoo:digits", "--dtype", "half"], f"--dtype: {EXPECTED}"),
        (["encode", "m", "v", "o", "--dtype", "fp16"], "--dtype: expected 'bfloat16' or 'float32', got 'fp16'"),
    ],
)
def test_options_refuse_others_in_the_same_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_recipes_refuse_others_in_the_same_words() -> None:
    with pytest.raises(UsageError, match=f"export.dtype: {EXPECTED}"):
        parse_recipe(TEXT, ["export.dtype=half"])
