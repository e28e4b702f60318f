"""What a stage cannot have is named when its run is checked, before a step of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_case import RECIPE, write_teacher

from mla_convert.errors import UserError
from mla_convert.pipeline import checks, run
from mla_convert.pipeline.checks import check_recipe
from mla_convert.recipe.load import parse_recipe
from mla_convert.registry import stage_of

CLIPS = {
    "digits": "data.kind=digits",
    "rollouts": "data={kind: rollouts, heldout: 2, rollouts: {clips: 4, num_frames: 6, prompts: ['7']}}",
}
DMD = {"stage": "dmd", "steps": 1, "learning_rate": 1e-6, "batch_size": 2, "tracker": None}
UNBOUNDED = "causal={num_frames_per_block: 3, window_frames: null}"
ABSOLUTE = "causal={num_frames_per_block: 3, window_frames: 9, sink_positions: absolute}"
STUDENT = {**DMD, "stage": "match_attention", "hidden_states": "student"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


REFUSED = [
    (
        {**DMD, "rollout_frames": 9, "score_frames": 4},
        [],
        "score_frames: 4 does not fit whole chunks",
    ),
    ({**DMD, "rollout_frames": 1500}, [ABSOLUTE], "1500 latent frames are more than the rotary table's 1024"),
    (STUDENT, ["convert.layers_per_latent=2"], "set hidden_states to teacher"),
]
HALF = (DMD, ["source.noise_range=[0.0, 0.5]", "generate.prompts=[]"], "stage dmd needs a model of all noise levels")


@pytest.mark.parametrize(
    ("clips", "stage", "changes", "message"),
    [*(("digits", *case) for case in (*REFUSED, HALF)), *(("rollouts", *case) for case in REFUSED)],
)
def test_a_recipe_is_refused_before_it_runs(
    teacher: Path, tmp_path: Path, clips: str, stage: dict[str, object], changes: list[str], message: str
) -> None:
    rest = [CLIPS[clips], *changes, "evaluate.rollout_prompts=0", "evaluate.clips=2"]
    recipe = parse_recipe(RECIPE.format(teacher=teacher), [f"distill=[{json.dumps(stage)}]", *rest])
    for refused in (lambda: check_recipe(recipe), lambda: run(recipe, tmp_path / "run")):
        with pytest.raises(UserError, match=message):
            refused()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", [DMD, {**DMD, "stage": "match_velocity", "preview": {"every": 1}}])
def test_a_rollout_in_training_needs_a_window(teacher: Path, tmp_path: Path, stage: dict[str, object]) -> None:
    """Training alone has no export, which would need one, too."""
    changes = [f"distill=[{json.dumps(stage)}]", UNBOUNDED, "evaluate.rollout_prompts=0"]
    recipe = parse_recipe(RECIPE.format(teacher=teacher), changes)
    with pytest.raises(UserError, match=f"stage {stage['stage']}.* needs a finite window; set causal.window_frames"):
        run(recipe, tmp_path / "run", until="distill")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "frozen", "needed"),
    [
        ({"stage": "dmd"}, ("teacher",), ("teacher",)),
        ({"stage": "dmd", "real_score": "real_score"}, ("real_score",), ("real_score", "teacher")),
        ({"stage": "consistency", "ema_decay": 0.9}, ("teacher",), ("teacher",)),
        ({"stage": "consistency", "ema_decay": 0.9, "teacher": "start"}, (), ()),
        ({"stage": "teacher_forcing"}, (), ()),
    ],
)
def test_what_a_run_has_to_load(changes: dict[str, object], frozen: tuple[str, ...], needed: tuple[str, ...]) -> None:
    recipe = parse_recipe(
        RECIPE.format(teacher="zoo:digits"),
        [
            f"distill=[{json.dumps({**DMD, **changes})}]",
            *(["real_score={model: 'zoo:digits'}"] if "real_score" in changes else []),
        ],
    )
    stage = stage_of(recipe.distill[0])
    assert (stage.frozen, stage.needed) == (frozen, needed)


def test_a_rate_that_is_small_for_adafactor_is_named(teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and also for a source on the Hub, of which nothing else can be checked."""
    checks._warn_of_rate.cache_clear()
    stages = [
        {**DMD, "optimizer": name, "learning_rate": rate} for name, rate in [("adamw", 1e-6), ("adafactor", 1e-3)]
    ]
    recipe = parse_recipe(RECIPE.format(teacher=teacher), [f"distill={json.dumps(stages)}", "evaluate.clips=2"])
    for _ in range(2):
        assert check_recipe(recipe).source
    on_hub = parse_recipe(RECIPE.format(teacher="owner/name"), [f"distill={json.dumps(stages[1:])}"])
    assert not check_recipe(on_hub).source
    # The critic's rate is the default.
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "stage dmd: Adafactor's learning rate is a share of each tensor's size, so the rate of the fake_score, 4e-07,"
    )
