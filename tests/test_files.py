"""A place that cannot be written to is named in one line, before long work, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mla_convert.cli import main
from mla_convert.errors import UserError
from mla_convert.files import (
    atomic_file,
    atomic_folder,
    check_place,
    claim_folder,
    explain_os_errors,
    locked_folder,
    save_tensors,
    write_json,
    write_text,
)
from mla_convert.load.locate import ZOO
from mla_convert.recipe.load import load_recipe
from mla_convert.recipe.shipped import find_recipe
from mla_convert.run import video
from mla_convert.zoo.digits.data import TEXT_DIM

# Above the largest number that Linux gives a process.
NOBODY = 1 << 23


def write_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")


@pytest.mark.parametrize("write", [lambda path: write_text(path, "a"), write_folder, check_place])
def test_a_place_where_nothing_can_be_is_named(tmp_path, write):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*/taken/in/a: .*/taken is a file; choose another place"):
        write(tmp_path / "taken" / "in" / "a")
    with pytest.raises(UserError, match=r"cannot write .*: File name too long; choose another place"):
        write(tmp_path / ("x" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """After a power cut a name must not lead to an empty file."""
    flushed, own = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino) or own(handle))
    write_text(tmp_path / "file", "a")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "part").mkdir()
        for name in ("a", "part/b"):
            (folder / name).write_text(name)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3 and flushed == {path.stat().st_ino for path in written}


def test_a_place_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_place(Path("a/b/c.mp4"))
    check_place(Path("."), folder=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write file: it is a file; give the name of a folder"):
        check_place(Path("file"), folder=True)
    with pytest.raises(UserError, match="it is a folder; give the name of a file"):
        check_place(tmp_path)


def test_a_file_that_is_read_meanwhile_is_not_the_one_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        (tmp_path / "other").read_text()
    with pytest.raises(UserError, match="cannot write a"), explain_os_errors(Path("a")):
        raise OSError(errno.EISDIR, "Is a directory")


def test_a_file_that_may_not_be_read_meanwhile_is_named_itself(tmp_path):
    denied = OSError(errno.EACCES, "Permission denied", str(tmp_path / "source"))
    with pytest.raises(UserError, match=rf"^no permission to open {tmp_path}/source$"), atomic_folder(tmp_path / "out"):
        raise denied
    with pytest.raises(UserError, match=rf"^no permission to write {tmp_path}/out$"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.EPERM, "Operation not permitted", str(tmp_path / f".out.{os.getpid()}.tmp" / "a"))
    with pytest.raises(UserError, match=rf"^no permission to write {tmp_path}/a$"), atomic_file(tmp_path / "a"):
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("name", ["wan", "wan[1]"])
def test_a_folder_leaves_the_work_of_a_sibling_alone_and_clears_its_own(tmp_path, name):
    for left in (f".{name}.{NOBODY}.tmp", f".{name}.{NOBODY}.old.tmp"):
        write_text(tmp_path / left / "old", "old")
    with atomic_folder(tmp_path / f"{name}.bf16") as sibling:
        write_folder(tmp_path / name)
        assert sibling.is_dir()
        (sibling / "b").write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.bf16"]
    # The folder that was put aside came back, and was then replaced.
    assert [path.name for path in (tmp_path / name).iterdir()] == ["a"]


def test_a_folder_that_was_put_aside_comes_back(tmp_path):
    write_text(tmp_path / ".wan[1].7.old.tmp" / "old", "old")
    with pytest.raises(UserError), atomic_folder(tmp_path / "wan[1]"):
        raise UserError("no")
    assert (tmp_path / "wan[1]" / "old").read_text() == "old"


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    other = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    written = tmp_path / f".wan.{other.pid}.tmp"
    written.mkdir()
    write_folder(tmp_path / "wan")
    assert written.is_dir()
    # A process that began later is not its writer.
    os.utime(written, (1, 1))
    write_folder(tmp_path / "wan")
    assert [path.name for path in tmp_path.iterdir()] == ["wan"]
    other.communicate()


@pytest.mark.parametrize("write", [lambda path: write_text(path, "a"), check_place])
def test_no_link_is_followed_to_write_a_file(tmp_path, write):
    (tmp_path / "mine").write_text("mine")
    os.utime(tmp_path / "mine", (1, 1))
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    write(tmp_path / "a")
    assert ((tmp_path / "mine").read_text(), os.stat(tmp_path / "mine").st_mtime) == ("mine", 1)
    assert not (tmp_path / "a").is_symlink()


def test_no_link_is_followed_to_lock_a_folder(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(UserError, match=r"cannot write .*out: Too many levels of symbolic"),
        locked_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_text_is_utf_8_in_any_locale(tmp_path):
    """The recipe of Self-Forcing has a negative prompt in Chinese."""
    script = (
        "import locale, sys\n"
        "from pathlib import Path\n"
        "from mla_convert.files import write_text\n"
        "from mla_convert.recipe.load import load_recipe\n"
        "from mla_convert.recipe.shipped import find_recipe\n"
        "assert locale.getpreferredencoding(False) != 'UTF-8'\n"
        "write_text(Path(sys.argv[1]), load_recipe(find_recipe('self-forcing-1.3b')).dump())\n"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script, str(tmp_path / "recipe.yaml")]
    subprocess.run(command, env={**os.environ, **locale}, check=True)
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(find_recipe("self-forcing-1.3b"))


HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from mla_convert.files import locked_folder\n"
    "with locked_folder(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_a_folder_is_kept_for_one_process_until_it_ends(tmp_path):
    path = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    busy = rf"another process is working in .*run \(process {holder.pid} on {socket.gethostname()}\); wait for it or"
    for _ in range(2):
        with pytest.raises(UserError, match=busy), locked_folder(path):
            pass
    holder.kill()
    holder.communicate()
    # What a killed process left neither locks nor makes the folder somebody else's.
    assert [file.name for file in path.iterdir()] == [".lock"]
    claim_folder(path, "run folder")
    with locked_folder(path), pytest.raises(UserError, match="working in"), locked_folder(path):
        pass
    assert path.is_dir() and not list(path.iterdir())
    ended = subprocess.run([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.DEVNULL, check=True)
    assert ended.returncode == 0


def test_a_locked_folder_goes_if_it_was_made_for_nothing(tmp_path):
    with locked_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with locked_folder(tmp_path / "c"):
        (tmp_path / "c" / "result").touch()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["result"]


def test_what_blocks_in_a_locked_folder_is_not_taken_for_the_lock(tmp_path):
    with pytest.raises(BlockingIOError), locked_folder(tmp_path / "a"):
        raise BlockingIOError("a pipe")


def test_a_lock_that_its_holder_removed_is_not_one(tmp_path, monkeypatch):
    """The file is opened before its holder removes it and locked after; a third process may hold a new file by then."""
    opened, lockf = [], fcntl.lockf

    def removed(handle, *rest):
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(handle)
        lockf(handle, *rest)

    monkeypatch.setattr(fcntl, "lockf", removed)
    with locked_folder(tmp_path):
        assert len(opened) == 2 and (tmp_path / ".lock").is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def unsupported(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with (
        pytest.raises(UserError, match="is on a file system that locks no files; give another"),
        locked_folder(tmp_path / "a"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_tensors_have_the_mode_of_any_file_and_name_the_place(tmp_path):
    old = os.umask(0o022)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match=r"cannot write .*gone"), explain_os_errors(tmp_path / "gone" / "a"):
        save_tensors({"a": torch.ones(2)}, tmp_path / "gone" / "a")


def test_what_ffmpeg_cannot_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(video.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    script = tmp_path / "ffmpeg"
    frames = np.zeros((2, 16, 16, 3), np.float32)
    for said, message in (("Permission denied", "no permission to write"), ("odd", "ffmpeg could not encode")):
        script.write_text(f"#!/bin/sh\ncat > /dev/null\necho 'out: {said}' >&2\nexit 1\n")
        script.chmod(0o755)
        with pytest.raises(UserError, match=f"{message} {tmp_path}/a.mp4"):
            video.save_video(frames, tmp_path / "a.mp4", 8)


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (
            ["evaluate", "{model}", "--teacher", "zoo:digits", "--out", "{}"],
            "mla_convert.pipeline.evaluation.load_checkpoint",
        ),
        (["inspect", "zoo:digits", "--out", "{}"], "mla_convert.pipeline.inspection.load_source"),
        (["bench", "--preset", "digits", "--out", "{}"], "mla_convert.evaluate.bench.bench"),
        (
            ["generate", str(ZOO / "digits" / "teacher"), "--prompt", "7", "--out", "{}.mp4"],
            "mla_convert.pipeline.execution.load_models",
        ),
    ],
)
def test_commands_look_at_the_place_before_they_compute(tmp_path, tmp_path_factory, monkeypatch, capsys, command, work):
    model = tmp_path_factory.mktemp("model")
    digits = {"text_dim": TEXT_DIM, "in_channels": 1}
    write_json(model / "config.json", {"mla": {"position": "derived"}, **digits})
    command = [word.replace("{model}", str(model)) for word in command]

    def begun(*_, **__):
        raise AssertionError("began to compute")

    monkeypatch.setattr(work, begun)
    (tmp_path / "taken").touch()
    assert main([word.replace("{}", str(tmp_path / "taken" / "x")) for word in command]) == 1
    assert "taken is a file; choose another place" in capsys.readouterr().err
    assert main([word.replace("{}", str(tmp_path / "free" / "x")) for word in command]) == 1
    assert "began to compute" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
