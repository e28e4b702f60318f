"""What a file system keeps although it was deleted, as NFS keeps open files, ends no training."""

from __future__ import annotations

import errno
import logging
import os
import shutil

import distill_case as case
import pytest
import torch

from mla_convert.distill.state import Checkpoints
from mla_convert.files import atomic_folder, discard_folder

HELD = ".nfs0001"


@pytest.fixture
def nfs(monkeypatch):
    """Files called `student.safetensors` are open somewhere: deleting one leaves `HELD`. Yields what ends that."""
    unlink = os.unlink

    def hold(path, *, dir_fd=None):
        name = os.path.basename(path)
        if name == HELD:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        if name == "student.safetensors":
            os.rename(path, os.path.join(os.path.dirname(path), HELD), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", hold)
        yield patch.undo


def test_a_folder_that_stays_is_emptied_and_named(tmp_path, nfs, caplog):
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("optimizer.pt", "student.safetensors", "z"):
        (folder / name).touch()
    with caplog.at_level(logging.WARNING):
        assert not discard_folder(folder)
    assert [path.name for path in folder.iterdir()] == [HELD]
    assert f"cannot remove all of {folder}: [Errno 16] Device or resource busy" in caplog.text
    nfs()
    assert discard_folder(folder) and not folder.exists()
    assert discard_folder(folder)


def test_a_folder_is_replaced_although_the_old_one_stays(tmp_path, nfs):
    for text in ("before", "after"):
        with atomic_folder(tmp_path / "wan") as folder:
            (folder / "student.safetensors").write_text(text)
    assert (tmp_path / "wan" / "student.safetensors").read_text() == "after"


def test_old_checkpoints_that_stay_end_no_training_and_go_later(tmp_path, nfs, caplog, monkeypatch):
    changes = {"checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": None}
    _, expected = case.train(tmp_path / "whole", **changes)
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    freed = []
    save = Checkpoints.save

    def freeing(self, state, write):
        if state.row["step"] == 8:
            freed.extend(path.name for path in self.folder.iterdir())
            nfs()
        save(self, state, write)

    monkeypatch.setattr(Checkpoints, "save", freeing)
    with caplog.at_level(logging.WARNING):
        _, weights = case.train(tmp_path / "run", **changes)
    assert sorted(freed) == [f"step-{step:08d}" for step in range(1, 8)]
    assert "cannot remove all of" in caplog.text and HELD in caplog.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_broken_checkpoint_that_stays_takes_no_other_ones_place(tmp_path, nfs):
    changes = {"keep_checkpoints": 1, "eval_every": None}
    case.train(tmp_path, **changes)
    folder = tmp_path / "checkpoints"
    broken = folder / "step-00000008"
    (broken / "optimizer.pt").unlink()
    shutil.copytree(broken, folder / "step-00000009")
    with pytest.raises(case.Killed):
        case.train(tmp_path, last_clip=7, checkpoint_minutes=1e-9, **changes)
    found = {path.name: sorted(file.name for file in path.iterdir()) for path in folder.iterdir()}
    assert "optimizer.pt" in found.pop("step-00000004")
    assert {"step-00000008", "step-00000009"} < set(found) and all(files == [HELD] for files in found.values())
    result, _ = case.train(tmp_path, **changes)
    assert result.resumed_from == 4
