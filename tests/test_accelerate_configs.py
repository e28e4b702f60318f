"""The shipped launcher configurations: Accelerate reads them, and stages refuse what they cannot do."""

from __future__ import annotations

from pathlib import Path

import distill_case as case
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from mla_convert.distill.launch import check_launch
from mla_convert.errors import UserError
from mla_convert.pipeline.dry_run import read_launch

FILES = sorted((Path(__file__).parents[1] / "recipes" / "accelerate").glob("*.yaml"))
KINDS = {
    "one-gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed-zero2": "DEEPSPEED",
    "machines": "MULTI_GPU",
}


def test_every_file_is_tested():
    assert {path.stem for path in FILES} == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    """Read by its own loader, and merged with a command line as `accelerate launch` does."""
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType(KINDS[path.stem])
    assert config.mixed_precision == "no"
    words = ["--config_file", str(path), "-m", "mla_convert", "distill", "demo"]
    arguments, merged, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert merged is not None
    assert arguments.num_processes == config.num_processes
    assert arguments.use_fsdp == (path.stem == "fsdp2")
    if path.stem == "fsdp2":
        assert str(arguments.fsdp_version) == "2"
    launch = read_launch(path, 1)
    if path.stem == "deepspeed-zero2":
        assert arguments.use_deepspeed
        assert arguments.zero_stage == 2
    how = (path.stem == "fsdp2", path.stem == "deepspeed-zero2")
    assert (launch.processes, launch.sharded, launch.zero) == (config.num_processes, *how)


@pytest.mark.parametrize(
    ("variables", "stage", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "match_velocity", "FSDP1 is not supported; set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "match_velocity", "on the CPU Accelerate uses DDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "match_velocity", "on the CPU Accelerate uses DDP"),
    ],
)
def test_what_cannot_be_is_said(monkeypatch, variables, stage, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mla_convert.distill.launch.has_gpu", lambda: False)
    with pytest.raises(UserError, match=message) as error:
        check_launch(case.make_config(stage))
    assert "\n" not in str(error.value)


def test_what_cannot_be_sharded_is_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("mla_convert.distill.launch.has_gpu", lambda: True)
    with pytest.raises(UserError, match="hooks into the blocks, which FSDP2 does not allow"):
        check_launch(case.make_config("match_attention"))
    for stage in ("match_velocity", "dmd"):
        check_launch(case.make_config(stage))


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        (
            {"CONFIG_FILE": "ds.json"},
            {},
            "a DeepSpeed configuration file is not supported; use recipes/accelerate/deepspeed-zero2.yaml",
        ),
        ({"ZERO_STAGE": "3"}, {}, "supported only with zero_stage 2"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "set offload_optimizer_device: none"),
        ({}, {"stage": "dmd"}, "trains two networks, DeepSpeed's engine only one"),
        ({}, {"optimizer": "adafactor"}, "set optimizer: adamw"),
        ({}, {"mixed_precision": "fp16"}, "set mixed_precision: bf16"),
        ({}, {"spike": {"action": "skip"}}, "set spike.action to warn or stop"),
    ],
)
def test_what_deepspeed_cannot_do_is_said(monkeypatch, variables, settings, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("mla_convert.distill.launch.has_gpu", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    check_launch(case.make_config())
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UserError, match=message) as error:
        check_launch(case.make_config(**settings))
    assert "\n" not in str(error.value)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        check_launch(case.make_config())
