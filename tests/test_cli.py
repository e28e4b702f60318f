"""What the commands print, where they print it, and their exit codes."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer.main
from recipe_case import digests, write_recipe, write_teacher
from safetensors.torch import load_file, save_file
from warm import Python

import mla_convert.cli
from mla_convert import __version__
from mla_convert.cli import main
from mla_convert.cli.output import DEBUG, print_result

COMMANDS = [
    "inspect",
    "plan",
    "encode",
    "convert",
    "distill",
    "export",
    "evaluate",
    "generate",
    "run",
    "recipes",
    "demo",
]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "matplotlib", "pydantic"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def recipe(teacher, tmp_path_factory):
    return str(write_recipe(tmp_path_factory.mktemp("recipe") / "pico.yaml", teacher))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["run", recipe, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def no_debug(monkeypatch):
    # Set and not deleted, so that what --debug puts there is undone.
    monkeypatch.setenv(DEBUG, "0")


def call(capsys, *args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def error_line(err: str) -> str:
    """The one line of an error."""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert err.count("error: ") == 1
    return line.removeprefix("error: ")


def test_version_and_help(capsys):
    assert call(capsys, "--version")[:2] == (0, f"mla-convert {__version__}\n")
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_knows_json(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    if command == "recipes":
        code, out, _ = call(capsys, command, "check", "--help")
    assert "--json" in out


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes", "list"], ["recipes", "show", "demo"]])
def test_light_commands_import_nothing_heavy(arguments):
    code = (
        f"import sys; from mla_convert.cli import main; code = main({arguments!r}); "
        f"print(code, sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() in ("0 []", "0 ['pydantic']")


def test_plan_needs_no_torch():
    code = "import sys; from mla_convert.cli import main; main(['plan', '--preset', 'digits', '--json']); "
    code += f"print(sorted({HEAVY - {'pydantic'}!r} & set(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Typer's click says "option: --hlep", click 8.5.1 "option '--hlep'".
        (["--hlep"], "--hlep"),
        (["rnu"], "No such command 'rnu'"),
        (["run"], "give a RECIPE; only --resume with the --out of a run"),
        (["run", "nothing-like-it"], "no recipe file or shipped recipe is called 'nothing-like-it'"),
        (["plan"], "give exactly one of SOURCE and --preset"),
        (["plan", "--preset", "wan2.1-t2v-1.3"], "wan2.1-t2v-1.3b"),
        (["plan", "--preset", "digits", "--frames", "many"], "Invalid value for '--frames'"),
        (["recipes", "show", "dmo"], "did you mean demo?"),
        (["recipes", "check", "demo", "--set", "convert.kv_lora_rnak=3"], "unknown key convert.kv_lora_rnak; did you"),
        (["run", "demo", "--set", "convert.qk_rope_head_dim=3"], "qk_rope_head_dim must be even"),
        (["generate", "x", "--out", "x.mp4"], "no prompt; give --prompt, --prompt-embeds, or --prompts"),
        (["generate", "x", "--out", "x.mp4", "--prompt", "7", "--latent-size", "3"], "'3' is not a size"),
        (["export", "x", "y", "--max-shard-size", "big"], "with KB, MB or GB, such as 5GB, got 'big'"),
        (["recipes", "check", "demo", "--set", "name=a b"], "name: use letters, digits, dots, dashes and"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert message in error_line(err)
    assert len(err.strip().splitlines()) == 1
    assert (code, out) == (2, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "out"], "nowhere does not exist"),
        (["evaluate", "nowhere"], "nowhere does not exist"),
        (["generate", "nowhere", "--out", "x.mp4", "--prompt", "7"], "nowhere does not exist"),
        (["plan", "nowhere"], "nowhere does not exist"),
        (["run", "demo", "--set", "source.model=nowhere"], "nowhere does not exist"),
    ],
)
def test_failure_is_one_line_and_exit_1(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert message in error_line(err)
    assert (code, out) == (1, "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bug_is_one_line_with_a_hint_and_a_traceback_on_request(capsys, monkeypatch):
    def broken(_):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("mla_convert.cli.recipes.find_recipe", broken)
    code, _, err = call(capsys, "recipes", "show", "demo")
    assert code == 1
    assert error_line(err).startswith("ZeroDivisionError: division by zero (unexpected; `mla-convert --debug ...`")
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "recipes", "show", "demo"])


def test_what_runs_out_is_explained():
    assert "out of memory; lower the batch sizes" in mla_convert.cli.unexpected(MemoryError())
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ...")
    assert mla_convert.cli.unexpected(cpu, "generate").startswith("out of memory; give --offload model")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")
    assert "the disk is full: cannot write runs/x" in mla_convert.cli.unexpected(full)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (
            ["generate", "{tmp}", "--prompt", "7", "-o", "{tmp}/x.mp4"],
            "give --offload model, or --offload group where one transformer alone",
        ),
        (["vbench", "{tmp}", "--vbench", "{tmp}"], "give --offload model, or --offload group"),
        (["evaluate", "{tmp}"], "give a smaller --batch-size"),
        (["inspect", "zoo:digits"], "give --clips 0"),
        (["encode", "{tmp}", "--components", "{tmp}", "-o", "{tmp}/x"], "give a smaller --batch-size, --height and"),
        (["bench", "zoo:digits"], "give a smaller --batch-size, --frames"),
        (["run", "demo", "-o", "{tmp}/x"], "lower the batch sizes of the recipe"),
    ],
)
def test_what_takes_less_memory_is_an_option_of_the_command(capsys, monkeypatch, tmp_path, arguments, remedy):
    class OutOfMemoryError(RuntimeError):
        """Has the name of torch's class."""

    def full(*_, **__):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 3.52 GiB.")

    for module, name in (
        ("pipeline.generation", "generate_video"),
        ("pipeline.vbench", "run_vbench"),
        ("pipeline.evaluation", "evaluate_checkpoint"),
        ("pipeline.inspection", "inspect_source"),
        ("distill.encode", "encode_videos"),
        ("evaluate.bench", "bench"),
        ("pipeline", "run"),
    ):
        monkeypatch.setattr(importlib.import_module(f"mla_convert.{module}"), name, full)
    code, _, err = call(capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert code == 1 and error_line(err).startswith(f"out of memory; {remedy}")
    command = typer.main.get_command(mla_convert.cli.app).commands[arguments[0]]
    options = {option for parameter in command.params for option in parameter.opts}
    named = mla_convert.cli.LESS_MEMORY.get(arguments[0], "").replace(",", "").split()
    assert {word for word in named if word.startswith("--")} <= options


def test_interrupt_is_exit_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_convert.cli.recipes.find_recipe", interrupted)
    code, _, err = call(capsys, "recipes", "show", "demo")
    assert (code, error_line(err)) == (130, "interrupted")


HELD = """
import sys, time
from pathlib import Path
from mla_convert import cli
from mla_convert.files import atomic_file

def hold(_):
    with atomic_file(Path(sys.argv[1])) as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)

cli.recipes.find_recipe = hold
sys.exit(cli.main(["recipes", "show", "demo"]))
"""


@pytest.mark.parametrize("launched", [False, True])
def test_sigterm_ends_in_order_unless_a_launcher_sends_it(tmp_path, launched):
    command = [sys.executable, "-c", HELD, str(tmp_path / "x")]
    env = {**os.environ, **({"WORLD_SIZE": "2"} if launched else {})}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, err = process.communicate(timeout=60)
    if launched:
        assert process.returncode == -signal.SIGTERM
    else:
        assert (process.returncode, error_line(err)) == (143, "terminated")
        assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("arguments", [[], ["recipes"]])
def test_help_without_arguments_is_no_error(capsys, arguments):
    code, out, err = call(capsys, *arguments)
    assert code == 2 and "Usage" in out + err and "error" not in err.lower()


def test_piped_results_are_neither_wrapped_nor_marked_up(capsys, monkeypatch):
    name = "runs/" + "long name " * 20 + "[bold] [x].mp4"
    print_result(False, {}, f"wrote {name}")
    assert capsys.readouterr().out == f"wrote {name}\n"


def test_an_error_before_any_progress_stands_alone(capsys):
    for command in (["evaluate", "nowhere"], ["push", "nowhere", "a/b"]):
        code, _, err = call(capsys, *command)
        assert (code, err) == (1, "error: nowhere does not exist\n")


def test_plan_says_the_papers_numbers(capsys):
    code, out, err = call(capsys, "plan", "--preset", "wan2.1-t2v-1.3b", "--json")
    plan = json.loads(out)
    assert (code, err) == (0, "")
    assert (plan["dense_scalars_per_token"], plan["latent_scalars_per_token"]) == (3072, 224)
    assert round(100 * plan["reduction"], 1) == 92.7
    assert round(plan["dense_cache_bytes"] / 1e9, 2) == 6.04
    assert round(plan["latent_cache_bytes"] / 1e9, 2) == 0.44
    assert 0 < plan["max_streams_dense"] < plan["max_streams_latent"]


def test_plan_options_change_the_plan(capsys):
    def plan(*options):
        return json.loads(call(capsys, "plan", "--preset", "wan2.1-t2v-1.3b", "--json", *options)[1])

    assert plan("--frames", "42")["dense_cache_bytes"] == 2 * plan()["dense_cache_bytes"]
    assert plan("--dtype", "float32")["latent_cache_bytes"] == 2 * plan()["latent_cache_bytes"]
    assert plan("--kv-lora-rank", "96")["latent_scalars_per_token"] == 128
    assert plan("--kv-lora-rank", "96", "--qk-rope-head-dim", "0")["latent_scalars_per_token"] == 96
    assert plan("--gpu", "24GB")["max_streams_latent"] < plan("--gpu", "H100")["max_streams_latent"]


def test_plan_reads_a_model(capsys, teacher, finished):
    dense = json.loads(call(capsys, "plan", teacher, "--kv-lora-rank", "8", "--json")[1])
    assert (dense["dense_scalars_per_token"], dense["latent_scalars_per_token"]) == (48, 8)
    latent = json.loads(call(capsys, "plan", finished, "--json")[1])
    keys = ("dense_scalars_per_token", "latent_scalars_by_layer", "dense_cache_bytes", "tokens_per_frame")
    assert {key: latent[key] for key in keys} == {key: dense[key] for key in keys}
    code, _, err = call(capsys, "plan", finished, "--kv-lora-rank", "8")
    assert code == 2
    assert "already converted" in error_line(err)


def test_recipes_are_listed_shown_copied_and_checked(capsys, tmp_path):
    listed = json.loads(call(capsys, "recipes", "list", "--json")[1])
    assert "demo" in [entry["name"] for entry in listed["recipes"]]
    shown = call(capsys, "recipes", "show", "demo")[1]
    code, out, _ = call(capsys, "recipes", "copy", "demo", tmp_path, "--json")
    copy = tmp_path / "demo.yaml"
    assert (code, json.loads(out)) == (0, {"path": str(copy)})
    assert copy.read_text() == shown

    code, _, err = call(capsys, "recipes", "copy", "demo", copy)
    assert code == 1
    assert "--force" in error_line(err)
    assert call(capsys, "recipes", "copy", "demo", copy, "--force")[0] == 0

    checked = json.loads(call(capsys, "recipes", "check", copy, "--set", "seed=5", "--json")[1])
    assert checked["valid"]
    assert checked["recipe"]["seed"] == 5
    resolved = call(capsys, "recipes", "check", copy, "--resolved")[1]
    copy.write_text(resolved)
    assert call(capsys, "recipes", "check", copy, "--resolved")[1] == resolved


def test_run_prints_one_object_with_the_figures(capsys, recipe, finished):
    code, out, err = call(capsys, "run", recipe, "--out", finished, "--resume", "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert result["latent_scalars_per_token"] == 8
    assert {"teacher_loss", "converted_loss", "student_loss", "accuracy", "seconds"} <= result.keys()
    assert all(os.path.exists(path) for name, path in result["files"].items() if name != "videos")
    assert len(result["files"]["videos"]) == 1


def test_run_prints_a_table(capsys, recipe, finished):
    code, out, _ = call(capsys, "run", recipe, "--out", finished, "--resume")
    assert code == 0
    for words in ("cached scalars per token", "-83.333 %", "held-out loss", "digits recognized", "report.html"):
        assert words in out


def test_demo_goes_on_by_itself(capsys, teacher, tmp_path):
    sets = [
        f"source.model={teacher}",
        "convert.layers_per_latent=2",
        "convert.kv_lora_rank=16",
        "convert.calibration={clips: 2, batch_size: 2}",
        "distill.0.steps=1",
        "distill.0.batch_size=1",
        "evaluate={clips: 2, rollout_prompts: 1, long_factor: 0, num_inference_steps: 1}",
        "generate={prompts: ['7'], num_frames: 3, num_inference_steps: 1}",
    ]
    options = [option for override in sets for option in ("--set", override)]
    assert main(["convert", "demo", "--out", str(tmp_path / "demo"), *options]) == 0
    for _ in range(2):
        code, out, _ = call(capsys, "demo", "--out", tmp_path / "demo", *options)
        assert code == 0
        assert "dense teacher" in out
        assert "samples" in out


def test_convert_and_distill_stop_where_they_say(capsys, recipe, tmp_path):
    folder = tmp_path / "run"
    code, out, _ = call(capsys, "convert", recipe, "--out", folder, "--json")
    assert (code, json.loads(out)["model"]) == (0, str(folder / "stages" / "00-convert"))
    code, out, _ = call(capsys, "distill", recipe, "--out", folder, "--resume", "--json")
    assert (code, json.loads(out)["model"]) == (0, str(folder / "stages" / "01-match_velocity"))
    assert not (folder / "checkpoint").exists()


def test_export_writes_another_dtype(capsys, finished, tmp_path):
    code, out, _ = call(capsys, "export", finished, tmp_path / "out", "--dtype", "float32", "--json")
    assert (code, json.loads(out)["dtype"]) == (0, "float32")
    assert (tmp_path / "out" / "README.md").exists()


def test_evaluate_writes_a_report(capsys, finished, teacher, tmp_path):
    arguments = ["evaluate", finished, "--out", tmp_path / "report", "--clips", "2", "--rollout-prompts", "0"]
    code, out, _ = call(capsys, *arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["source"] == str(teacher)
    assert result["loss_increase"] == pytest.approx(result["student_loss"] / result["teacher_loss"] - 1)
    assert len(result["attention_rel_error"]) == 2
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.html"}

    code, out, _ = call(capsys, *arguments, "--teacher", teacher)
    assert code == 0
    assert "velocity error" in out


def test_evaluate_leaves_the_run_as_it_is(capsys, recipe, finished):
    before = digests(finished / "checkpoint")
    assert call(capsys, "evaluate", finished, "--clips", "2", "--rollout-prompts", "0")[0] == 0
    assert (finished / "evaluation" / "report.html").exists()
    assert digests(finished / "checkpoint") == before


def test_evaluate_twice_says_the_same(capsys, finished, tmp_path):
    reports = []
    for name in ("one", "two"):
        arguments = ["--clips", "2", "--rollout-prompts", "2", "--out", tmp_path / name]
        assert call(capsys, "evaluate", finished, *arguments)[0] == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert all(report.pop("seconds") for report in reports)
    assert reports[0]["digits_bench"]["lengths"]["1x"]["student"]["digit_accuracy"]["low"] is not None
    assert reports[0] == reports[1]


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "frames", "latents.safetensors"])
def test_generate_writes_what_the_suffix_says(capsys, finished, tmp_path, name):
    out_file = tmp_path / name
    arguments = ["generate", finished, "--prompt", "7 moving up-left", "--frames", "20", "--steps", "1"]
    code, out, _ = call(capsys, *arguments, "--out", out_file, "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["path"], result["frames"]) == (str(out_file), 20)
    if name.endswith(".safetensors"):
        assert load_file(out_file)["latents"].shape == (1, 20, 16, 16)
    elif name == "frames":
        assert len(list(out_file.iterdir())) == 20
    else:
        assert out_file.stat().st_size > 500


def test_generate_from_embeddings_equals_generate_from_the_prompt(capsys, finished, tmp_path):
    from mla_convert.zoo.digits.data import parse_prompt

    save_file({"prompt_embeds": parse_prompt("3 moving down").embedding()}, tmp_path / "embeds.safetensors")
    common = ["generate", finished, "--frames", "6", "--steps", "2", "--seed", "3", "--out"]
    assert call(capsys, *common, tmp_path / "a.mp4", "--prompt", "3 moving down")[0] == 0
    assert call(capsys, *common, tmp_path / "b.mp4", "--prompt-embeds", tmp_path / "embeds.safetensors")[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", "seven"], 2, "cannot read the digits prompt 'seven'"),
        (["--prompt", "7 moving sideways"], 2, "unknown direction 'sideways'"),
        (["--prompt-embeds", "none.safetensors"], 1, "cannot read prompt embeddings from none.safetensors"),
        (["--prompt", "7", "--latent-size", "15x16"], 2, "15x16"),
    ],
)
def test_generate_refuses_bad_prompts(capsys, finished, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    got, _, err = call(capsys, "generate", finished, "--out", "x.mp4", *options)
    assert message in error_line(err)
    assert got == code
    assert list(tmp_path.iterdir()) == []


def test_generate_knows_what_it_cannot_write(capsys, finished, tmp_path):
    code, _, err = call(capsys, "generate", finished, "--prompt", "7", "--out", tmp_path / "x.avi")
    assert code == 2
    assert ".mp4, .gif" in error_line(err)


def test_sigkill_and_resume_on_the_command_line(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    command = ["-m", "mla_convert", "run", recipe, "--out", folder, "--resume", "--json"]
    process = Python(*command)
    while not (folder / "stages" / "00-convert").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.poll() == -signal.SIGKILL

    done = Python(*command).finish()

    assert done.code == 0, done.err
    assert json.loads(done.out)["run"] == str(folder)
    assert digests(folder / "checkpoint") == digests(finished / "checkpoint")


def test_distill_shares_the_work_of_two_processes(recipe, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "mla_convert", "distill", recipe, "--out", str(tmp_path / "run"), "--json"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == str(tmp_path / "run" / "stages" / "01-match_velocity")
    (rows,) = (tmp_path / "run" / "training").glob("*/metrics.jsonl")
    assert len(rows.read_text().splitlines()) == 7
