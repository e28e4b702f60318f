"""A student whose optimizer is in parts (DeepSpeed's ZeRO-2) trains as a whole one does and resumes exactly."""

from __future__ import annotations

import distill_case as case
import pytest
import zero_case

pytest.importorskip("deepspeed", reason="needs the package deepspeed, which is not a dependency")

# The average and the start of `consistency` share the student's weights here.
SETTINGS = {
    **case.IN_PARTS,
    "accumulated": {"batch_size": 1, "grad_accumulation": 2, "max_grad_norm": 0.03, "steps": 5},
    "lower": {"mixed_precision": "bf16", "steps": 5},
}
# Largest difference of a weight. Adam turns the rounding of another order of sums into steps where the gradient is
# near zero; bfloat16 rounds what both processes compute alike.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    return case.trained_by_two(tmp_path_factory.mktemp("parted"), zero_case.__file__, SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_parts_equal_one_process(parted, tmp_path, name):
    case.assert_as_one_process(parted / name, tmp_path, TOLERANCE, **SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_resume_exactly(parted, name):
    newest, resumed = case.equal_checkpoints(parted / name)
    assert len(list((newest / "optimizer").glob("part-*.pt"))) == 2
    for path in newest.rglob("*.*"):
        assert path.read_bytes() == (resumed / path.relative_to(newest)).read_bytes()
