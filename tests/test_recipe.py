"""A recipe says what it means or is refused in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from recipe_case import RECIPE

from mla_convert.cli import main
from mla_convert.errors import UsageError
from mla_convert.recipe.load import apply_override, first_difference, load_recipe, parse_recipe
from mla_convert.recipe.reader import read_yaml
from mla_convert.recipe.schema import Recipe
from mla_convert.recipe.shipped import describe_recipe, find_recipe, shipped_recipes

TEXT = RECIPE.format(teacher="zoo:digits")


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("5.0e-06", 5e-6),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_anchors_work_and_nothing_is_constructed():
    assert read_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}
    with pytest.raises(UsageError, match="could not determine a constructor"):
        read_yaml("!!python/object/apply:os.system [true]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' was already given on line 1; remove one"),
        ("a:\n  b: 1\n  b: 1", "line 3: key 'b' was already given on line 2; remove one"),
        ("1: a", "line 1: key '1' is not a string; put it in quotes"),
        ("? [a]\n: b", "is not a string"),
        ("a: [1", "line 1: not valid YAML"),
        ("a: b: c", "line 1: not valid YAML: mapping values are not allowed here"),
        ("\tx: 1", "not valid YAML"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("a: 1\nname: &a [*a]", "line 2: a value contains itself"),
        ("a: &a\n  b: *a", "line 2: a value contains itself"),
        ("seed: " + "1" * 5000, "line 1: an integer of 5,000 digits is too long"),
        ("name: " + "[" * 2000 + "]" * 2000, "line 1: lists and sections are nested more than 100 deep"),
        ("name: " + "{a: " * 150 + "1" + "}" * 150, "nested more than 100 deep"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(text, message):
    with pytest.raises(UsageError) as caught:
        read_yaml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nme=x", "unknown key nme; did you mean name?"),
        ("convert.kv_lora_rnak=3", "unknown key convert.kv_lora_rnak; did you mean kv_lora_rank?"),
        ("convert.calibration.clisp=3", "unknown key convert.calibration.clisp; did you mean clips?"),
        ("distill.0.learning_rat=1", "unknown key distill.0.learning_rat; did you mean learning_rate?"),
        ("causal.window=3", "unknown key causal.window; did you mean window_frames?"),
        (
            "source.qqq=3",
            "unknown key source.qqq; valid here: model, subfolder, revision, file, use_ema, dtype, noise_range",
        ),
        ("name=3", "name: expected a string, got 3 (an integer)"),
        ("seed=true", "seed: expected an integer, got true (a boolean)"),
        ("seed='1'", "seed: expected an integer, got '1' (a string)"),
        ("seed=1.5", "seed: expected an integer, got 1.5 (a number)"),
        ("seed=null", "seed: expected an integer, got nothing (null)"),
        ("convert=[1]", "convert: expected a section of keys, got [1] (a list)"),
        ("convert.keep_residual=yes", "convert.keep_residual: expected true or false, got 'yes' (a string)"),
        ("convert.kv_lora_rank=x", "convert.kv_lora_rank: expected an integer or a list, got 'x' (a string)"),
        ("convert.kv_lora_rank=[8, x]", "convert.kv_lora_rank.1: expected an integer, got 'x' (a string)"),
        ("convert.position=decopled", "did you mean decoupled?"),
        ("convert.position=derivd", "did you mean derived?"),
        ("convert.qk_rope_head_dim=3", "convert: qk_rope_head_dim must be even"),
        ("distill.0.learning_rate=fast", "distill.0.learning_rate: expected a number, got 'fast' (a string)"),
        ("distill.0.steps=0", "distill.0.steps: input should be greater than or equal to 1, got 0"),
        ("distill.0.stage=match_velocty", "no stage is called 'match_velocty'; did you mean match_velocity?"),
        ("distill.0.stage=[a]", 'distill.0.stage: expected a string, got ["a"] (a list)'),
        ("distill.0.betas=[1.5, 2]", "distill.0.betas.0: input should be less than 1, got 1.5 (a number)"),
        ("distill.0.betas=[0.9, 1.0]", "distill.0.betas.1: input should be less than 1, got 1.0 (a number)"),
        ("distill.0.learning_rate=.inf", "distill.0.learning_rate: expected a finite number, got inf (a number)"),
        ("distill.0.spike={factor: .inf}", "distill.0.spike.factor: expected a finite number, got inf (a number)"),
        ("distill.0.betas=[.nan, 0.9]", "distill.0.betas.0: expected a finite number, got nan (a number)"),
        ("generate.shift=.inf", "generate.shift: expected a finite number, got inf (a number)"),
        ("evaluate.guidance_scale=.inf", "expected a finite number"),
        ("convert.calibration.ridge=.inf", "convert.calibration.ridge: expected a finite number"),
        ("source.noise_range=[0.0, .inf]", "source.noise_range.1: expected a finite number"),
        ("source.adapters=[{file: a, scale: .inf}]", "source.adapters.0.scale: expected a finite number"),
        ("distill.0=3", "distill.0: expected a section of keys, got 3 (an integer)"),
        ("distill=3", "distill: expected a list, got 3 (an integer)"),
        ("causal={window_frames: 2}", "causal: window_frames=2 cannot hold sink_frames=0"),
        ("version=2", "version: expected 1, got 2"),
        ("source={}", "missing key source.model"),
        ("distill=[{}]", "missing key distill.0.stage; one of consistency, dmd, match_attention, match_velocity"),
        ("generate.prompts=7", "generate.prompts: expected a list, got 7 (an integer)"),
    ],
)
def test_wrong_recipe_is_refused_by_key(override, message):
    assert message in refusal(TEXT, override)


def test_unknown_key_is_named_before_the_one_it_hides():
    text = TEXT.replace("  model: zoo", "  modle: zoo")
    assert refusal(text) == "unknown key source.modle; did you mean model? (and 1 more)"


@pytest.mark.parametrize("text", ["", "- 1", "recipe", "3"])
def test_recipe_is_a_mapping(text):
    assert "mapping of sections" in refusal(text)


def test_file_that_cannot_be_read_is_named(capsys, tmp_path):
    with pytest.raises(UsageError, match=r"cannot read recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"bad\.yaml: it is not UTF-8"):
        load_recipe(tmp_path / "bad.yaml")
    for command in (["show", tmp_path / "bad.yaml"], ["copy", tmp_path / "bad.yaml", tmp_path / "new.yaml"]):
        assert main(["recipes", *map(str, command)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: cannot read recipe {tmp_path / 'bad.yaml'}: it is not UTF-8")
    assert not (tmp_path / "new.yaml").exists()
    (tmp_path / "key.yaml").write_text(TEXT + "sed: 1\n")
    with pytest.raises(UsageError, match=r"key\.yaml: unknown key sed; did you mean seed\?"):
        load_recipe(tmp_path / "key.yaml")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("distill.0.learning_rate=1e-4", ("distill", 0, "learning_rate"), 1e-4),
        ("convert.kv_lora_rank=[4, 5]", ("convert", "kv_lora_rank"), [4, 5]),
        ("causal.window_frames=9", ("causal", "window_frames"), 9),
        ("name=a=b", ("name",), "a=b"),
        ("source.model=", ("source", "model"), None),
        ("distill.0.betas=[0.9, 0.95]", ("distill", 0, "betas"), [0.9, 0.95]),
    ],
)
def test_override_sets_a_key(override, path, value):
    recipe = read_yaml(TEXT)
    apply_override(recipe, override)
    for key in path:
        recipe = recipe[key]
    assert recipe == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "is not of the form key.path=value"),
        ("=3", "is not of the form key.path=value"),
        ("a..b=3", "is not of the form key.path=value"),
        ("seed.x=3", "seed is not a section and has no key 'x'"),
        ("distill.1.steps=3", "distill has entries 0 to 0, not '1'"),
        ("distill.first.steps=3", "distill has entries 0 to 0, not 'first'"),
        ("seed=[", "--set seed: line 1: not valid YAML"),
    ],
)
def test_bad_override_is_refused(override, message):
    assert message in refusal(TEXT + "seed: 1\n", override)


def test_stage_is_validated_as_its_own_class():
    (stage,) = parse_recipe(TEXT, ["distill.0.copies=2"]).distill
    assert type(stage).__name__ == "MatchVelocityConfig"
    assert (stage.stage, stage.copies) == ("match_velocity", 2)


def test_dump_is_complete_deterministic_and_read_back():
    recipe = parse_recipe(TEXT, ["distill.0.learning_rate=1e-5", "causal={}"])
    again = parse_recipe(recipe.dump())
    assert again == recipe
    assert again.dump() == recipe.dump()
    assert again.sha256() == recipe.sha256()
    assert yaml.safe_load(recipe.dump()).keys() == Recipe.model_fields.keys()
    assert "teacher_weight: 1.0" in recipe.dump()


def test_order_of_keys_does_not_matter():
    lines = read_yaml(TEXT)
    turned = yaml.safe_dump(dict(reversed(list(lines.items()))), sort_keys=False)
    assert parse_recipe(turned).sha256() == parse_recipe(TEXT).sha256()
    assert parse_recipe(TEXT, ["seed=1"]).sha256() != parse_recipe(TEXT).sha256()


def test_first_difference_names_the_key():
    old = parse_recipe(TEXT).model_dump(mode="json")
    assert first_difference(old, old) is None
    new = parse_recipe(TEXT, ["distill.0.steps=7"]).model_dump(mode="json")
    assert first_difference(old, new) == ("distill.0.steps", 6, 7)
    fewer = parse_recipe(TEXT, ["distill=[]"]).model_dump(mode="json")
    assert first_difference(old, fewer)[0] == "distill"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_valid(name):
    recipe = load_recipe(find_recipe(name))
    assert recipe.name == (name if "/" not in name else "-".join(reversed(name.split("/"))))
    assert describe_recipe(find_recipe(name))


def test_paper_recipe_is_the_papers():
    convert = load_recipe(find_recipe("wan2.1-1.3b-paper")).convert
    assert (convert.position, convert.init) == ("decoupled", "svd")
    assert (convert.kv_lora_rank, convert.qk_rope_head_dim, convert.q_lora_rank) == (192, 32, 768)


DMD = "distill=[{stage: dmd, steps: 1, learning_rate: 1e-6, real_score: real_score}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([DMD], "the recipe has no section real_score; add one"),
        (["real_score={model: zoo:digits}"], "needs a stage dmd with real_score: real_score; remove it"),
        ([DMD, "real_score={model: zoo:digits, noise_range: [0.0, 0.5]}"], "leave out real_score.noise_range"),
    ],
)
def test_a_real_score_goes_with_its_stage(overrides, message):
    with pytest.raises(UsageError, match=message):
        parse_recipe(TEXT, overrides)
    assert parse_recipe(TEXT, [DMD, "real_score={model: zoo:digits}"]).real_score.model == "zoo:digits"


def test_demo_is_at_the_papers_ratio():
    convert = load_recipe(find_recipe("demo")).convert
    assert convert.kv_lora_rank / convert.layers_per_latent / (2 * 6 * 32) == pytest.approx(224 / 3072)


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("wan2.1-1.3b", 3072),
        ("self-forcing-1.3b", 3072),
        ("causal-forcing-1.3b", 3072),
        ("longlive-1.3b", 3072),
        ("wan2.1-14b", 10240),
    ],
)
def test_recipes_for_published_models_are_near_the_papers_ratio(name, dense):
    convert = load_recipe(find_recipe(name)).convert
    assert convert.kv_lora_rank / convert.layers_per_latent / dense == pytest.approx(224 / 3072, rel=0.02)


def test_recipe_is_found_by_name_or_path(tmp_path):
    assert find_recipe("demo").name == "demo.yaml"
    own = tmp_path / "own.yaml"
    own.write_text(TEXT)
    assert find_recipe(str(own)) == own
    with pytest.raises(UsageError, match=r"called 'dmo'; did you mean demo\?"):
        find_recipe("dmo")
    assert all(isinstance(path, Path) and path.is_file() for path in shipped_recipes().values())


def test_check_prints_every_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of stages and sections together; a missing stage is not blamed on what needs it."""
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    wrong = ["distill.0.stepz=3", "distill.0.learning_rate=fast", "convert.kv_lora_rnak=3", "seed=1.5"]
    sets = [word for override in wrong for word in ("--set", override)]
    assert main(["recipes", "check", str(path), "--json", *sets]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and all(line.startswith(f"error: {path}: ") for line in lines)
    for key in ("unknown key distill.0.stepz", "distill.0.learning_rate:", "unknown key convert.kv_lora_rnak", "seed:"):
        assert sum(f": {key}" in line for line in lines) == 1, key
    assert "(and " not in err

    shown = refusal(TEXT, *wrong)
    assert shown.startswith("unknown key distill.0.stepz") and shown.endswith(f"(and {len(lines) - 1} more)")
    alone = refusal(TEXT, "distill.0.stepz=3", "real_score={model: zoo:digits}")
    assert "real_score" not in alone
