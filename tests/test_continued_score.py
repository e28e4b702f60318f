"""A fake score that continues: written at the end of `dmd`, read by the next one, and what that needs of a recipe."""

from __future__ import annotations

import distill_case as case
import pytest
import torch
from recipe_case import RECIPE, write_teacher
from safetensors.torch import load_file

from mla_convert.distill.metrics import Metrics
from mla_convert.distill.sharding import write_whole
from mla_convert.distill.stages.dmd import DMD
from mla_convert.distill.state import Checkpoints
from mla_convert.errors import UsageError, UserError
from mla_convert.pipeline import run
from mla_convert.recipe.load import parse_recipe

SHORT = {"stage": "dmd", "denoising_steps": [1000, 500], "critic_updates": 2, "critic_learning_rate": 1e-3, "steps": 4}
STAGE = "stage: dmd, steps: 1, learning_rate: 1e-6, batch_size: 2, denoising_steps: [1000], critic_updates: 1, "
STAGE += "critic_learning_rate: 1e-3, tracker: null"


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a first stage left, of whose fake score only the self-attention was trained."""
    folder = tmp_path_factory.mktemp("first")
    case.train(folder, **{**SHORT, "critic_trainable": "attention"})
    return folder / "fake_score.safetensors"


def test_a_stage_leaves_all_weights_of_its_fake_score(left):
    weights, teacher = load_file(left), case.tiny_model()
    assert {name: tensor.dtype for name, tensor in weights.items()} == {
        name: torch.float32 for name, _ in teacher.named_parameters()
    }
    checkpoint = load_file(left.parent / "checkpoints" / "step-00000004" / "second.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, checkpoint.get(name, teacher.get_parameter(name)))
        assert torch.equal(tensor, teacher.get_parameter(name)) == (name not in checkpoint)


def test_what_a_killed_process_left_of_it_is_removed(left):
    killed = left.with_name(f".{left.name}.1.tmp")
    killed.write_bytes(b"half")
    write_whole(left.with_name("other.safetensors"), case.tiny_model(), main=True)
    assert killed.exists()
    write_whole(left, case.tiny_model(), main=False)
    assert killed.exists()
    before = left.read_bytes()
    write_whole(left, case.tiny_model(), main=True)
    assert not killed.exists()
    left.write_bytes(before)


def test_the_next_stage_begins_with_it(left, tmp_path, monkeypatch):
    seen, second_loss = [], DMD.second_loss

    def loss(self, models, batch, generator):
        seen.append({name: weight.detach().clone() for name, weight in models["fake_score"].named_parameters()})
        return second_loss(self, models, batch, generator)

    monkeypatch.setattr(DMD, "second_loss", loss)
    case.train(tmp_path, **{**SHORT, "steps": 1, "fake_score": "previous", "second_start": left})
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in load_file(left).items())


def test_a_resumed_stage_ends_with_the_same_bytes(left, tmp_path):
    """Also of weights that the stage does not train, which no checkpoint holds."""
    changes = {**SHORT, "fake_score": "previous", "second_start": left, "critic_trainable": "attention"}
    changes |= {"checkpoint_every": 2}
    case.train(tmp_path / "whole", **changes)
    with pytest.raises(case.Killed):
        case.train(tmp_path / "resumed", last_clip=19, **changes)
    result, _ = case.train(tmp_path / "resumed", **changes)
    assert result.resumed_from == 2
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    whole, resumed = ((tmp_path / name / left.name).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed != left.read_bytes()


def test_without_the_file_it_is_refused(left, tmp_path):
    with pytest.raises(UserError, match=r"stage dmd: .*none has no fake_score to continue from; train the stage"):
        case.train(tmp_path, **{**SHORT, "fake_score": "previous", "second_start": tmp_path / "none"})
    other = tmp_path / "other.safetensors"
    other.write_bytes((left.parent / "checkpoints" / "step-00000004" / "second.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds another network's weights"):
        case.train(tmp_path / "run", **{**SHORT, "fake_score": "previous", "second_start": other})


def test_a_recipe_continues_it_over_another_stage(tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    between = "{stage: match_velocity, steps: 1, learning_rate: 1e-6, batch_size: 2, tracker: null}"
    first, second = f"{{{STAGE}}}", f"{{{STAGE}, fake_score: previous}}"
    recipe = parse_recipe(RECIPE.format(teacher=teacher), [f"distill=[{first}, {between}, {second}]"])
    run(recipe, tmp_path / "run", until="distill")
    training = tmp_path / "run" / "training"
    one, three = (training / name / "fake_score.safetensors" for name in ("01-dmd", "03-dmd"))
    apart = parse_recipe(RECIPE.format(teacher=teacher), [f"distill=[{first}, {between}, {first}]"])
    run(apart, tmp_path / "apart", until="distill")
    again = tmp_path / "apart" / "training"
    assert (again / "01-dmd" / one.name).read_bytes() == one.read_bytes()
    assert (again / "03-dmd" / one.name).read_bytes() != three.read_bytes()
    continued, anew = (Metrics(path / "03-dmd" / "metrics.jsonl").rows()[-1] for path in (training, again))
    assert continued["fake_score_loss"] != anew["fake_score_loss"]

    one.unlink()
    run(recipe, tmp_path / "run", until="distill", resume=True)
    assert one.read_bytes() == (again / "01-dmd" / one.name).read_bytes()


def test_a_fake_score_that_was_made_again_must_be_the_same(tmp_path, monkeypatch):
    teacher, checkpoints, second_loss = write_teacher(tmp_path / "teacher"), Checkpoints.save, DMD.second_loss
    second = f"{{{STAGE.replace('steps: 1', 'steps: 2')}, fake_score: previous, checkpoint_every: 1}}"
    recipe = parse_recipe(RECIPE.format(teacher=teacher), [f"distill=[{{{STAGE}}}, {second}]"])

    def killed(self, state, write):
        checkpoints(self, state, write)
        if "02-dmd" in self.folder.parts:
            raise case.Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", killed)
        with pytest.raises(case.Killed):
            run(recipe, tmp_path / "run", until="distill")
    left = tmp_path / "run" / "training" / "01-dmd" / "fake_score.safetensors"
    before = left.read_bytes()
    left.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with monkeypatch.context() as patched:
        patched.setattr(DMD, "second_loss", lambda *given: (2 * second_loss(*given)[0], {}))
        with pytest.raises(UserError, match=r"step-00000001 began with other weights than"):
            run(recipe, tmp_path / "run", until="distill", resume=True)
    assert left.read_bytes() != before
    left.unlink()
    run(recipe, tmp_path / "run", until="distill", resume=True)
    assert left.read_bytes() == before
    rows = Metrics(tmp_path / "run" / "training" / "02-dmd" / "metrics.jsonl").rows()
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_a_recipe_without_an_earlier_stage_is_refused():
    with pytest.raises(UsageError, match=r"distill\.0\.fake_score: previous needs a stage dmd before it; set teacher"):
        parse_recipe(RECIPE.format(teacher="x"), [f"distill=[{{{STAGE}, fake_score: previous}}]"])
