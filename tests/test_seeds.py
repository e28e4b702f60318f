"""Seeds: one range for all sections and options, whose largest value leaves room to count up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from recipe_case import RECIPE, write_recipe, write_teacher

from mla_convert.cli import main
from mla_convert.convert.config import CalibrationConfig
from mla_convert.distill.keys import PreviewConfig
from mla_convert.errors import UsageError
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.recipe.load import parse_recipe
from mla_convert.recipe.schema import Recipe
from mla_convert.run.config import GenerateConfig

LARGEST = 2**63 - 1
SECTIONS = ["", "convert.calibration.", "evaluate.", "generate."]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("model", [Recipe, CalibrationConfig, EvaluateConfig, GenerateConfig, PreviewConfig])
def test_every_seed_has_the_same_range(model: type[BaseModel]) -> None:
    bounds = {type(rule).__name__.lower(): rule for rule in model.model_fields["seed"].metadata}
    assert (bounds["ge"].ge, bounds["le"].le) == (0, LARGEST)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(("seed", "bound"), [(-1, "greater than or equal to 0"), (2**63, f"equal to {LARGEST}")])
def test_a_seed_out_of_range_is_refused_by_its_key(section: str, seed: int, bound: str) -> None:
    with pytest.raises(UsageError, match=rf"^{section}seed: input should be .*{bound}, got {seed} \(an integer\)$"):
        parse_recipe(RECIPE.format(teacher="x"), [f"{section}seed={seed}"])


def test_a_run_with_the_largest_seeds_reaches_its_end(teacher: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "pico.yaml", teacher)
    sets = [option for section in SECTIONS for option in ("--set", f"{section}seed={LARGEST}")]
    sets += ["--set", "evaluate.rollout_seeds=2", "--set", "generate.prompts=['7', '8']", "--set", "distill.0.steps=1"]
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), *sets]) == 0


def test_generate_counts_up_from_the_largest_seed_and_refuses_others(
    capsys: Any, teacher: Path, tmp_path: Path
) -> None:
    arguments = ["generate", str(teacher), "--prompt", "7", "--prompt", "8", "--frames", "3", "--steps", "1"]
    arguments += ["-o", str(tmp_path / "x.safetensors"), "--seed"]
    assert main([*arguments, str(LARGEST)]) == 0
    for seed, message in (("-1", "Invalid value for '--seed'"), (str(2**63), "seed: input should be less than")):
        capsys.readouterr()
        assert main([*arguments, seed]) == 2
        err = capsys.readouterr().err
        assert message in err and "unexpected" not in err
