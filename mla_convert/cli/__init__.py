"""Defines the `mla-convert` command line. Commands import torch only when they run, so `--help` is fast."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import UserError, lacks_memory
from ..interrupts import INTERRUPTED
from . import bench, build, compare, demo, encode, generate, inspect, models, plan, push, recipes, vbench
from .output import DEBUG, hide_bars, print_error, show_notes
from .panels import Command
from .signals import orderly_end

LESS_MEMORY = {
    "generate": "give --offload model, or --offload group where one transformer alone does not fit, fewer prompts, a "
    "smaller --size, --vae-dtype bfloat16 or --expand-history pass",
    "vbench": "give --offload model, or --offload group where one transformer alone does not fit, a smaller "
    "--latent-size, --vae-dtype bfloat16 or --expand-history pass",
    "bench": "give a smaller --batch-size, --frames or --tokens-per-frame",
    "evaluate": "give a smaller --batch-size",
    "encode": "give a smaller --batch-size, --height and --width, or fewer --frames",
    "inspect": "give --clips 0, which inspects the weights alone, or --data with shorter clips",
}
"""What takes less memory, by command; the commands that run a recipe have its batch sizes."""

app = typer.Typer(
    name="mla-convert",
    help="Convert causal video diffusion transformers to multi-head latent attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mla-convert {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("encode")(encode.encode)
app.command("convert")(build.convert)
app.command("distill")(build.distill)
app.command("run")(build.run)
app.command("export")(models.export)
app.command("evaluate")(models.evaluate)
app.command("vbench", cls=Command)(vbench.vbench)
app.command("compare")(compare.compare)
app.command("bench")(bench.bench)
app.command("generate", cls=Command)(generate.generate)
app.command("push")(push.push)
app.command("demo")(demo.demo)
app.add_typer(recipes.app, name="recipes")


def main(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: success. 1: failure. 2: bad usage or recipe. 130: interrupted by Ctrl-C. 143: ended by SIGTERM. Both
    interruptions still finish a video file.
    """
    if sys.stderr is None:
        # What a closed stderr would have shown is dropped, as rich does.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.platform == "win32":
        print_error("mla-convert runs on Linux and macOS; on Windows use WSL2")
        return 1
    if sys.stdout is None:
        print_error("stdout is closed, and the result is printed there; redirect it to /dev/null if it is not needed")
        return 1
    show_notes()
    hide_bars(sys.argv[1:] if args is None else args)
    with orderly_end() as signals:
        return _run(args, signals)


def _run(args: list[str] | None, signals: list[int]) -> int:
    try:
        code = app(args=args, prog_name="mla-convert", standalone_mode=False)
        leave_processes()
    except UserError as error:
        # In a launch, the first process alone says what all of them have to say.
        if str(error):
            print_error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has closed it; keep the interpreter from complaining about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # A usage error is click's class or Typer's own, depending on the release.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # Without arguments, Typer has already printed the help and the message is empty.
            if error.format_message():
                print_error(error.format_message())
            return int(error.exit_code)
        if os.environ.get(DEBUG, "0") != "0":
            raise
        print_error(unexpected(error, _command(args)))
        return 1
    if code == INTERRUPTED and signals:
        print_error("terminated")
        return 128 + signals[0]
    if code == INTERRUPTED:
        print_error("interrupted")
    return code if isinstance(code, int) else 0


def leave_processes() -> None:
    """Destroy the process group of a distributed run: its threads, if they outlive Python, abort the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _command(args: list[str] | None) -> str | None:
    """The name of the command: the first argument that is not a flag, since global options take no value."""
    return next((word for word in (sys.argv[1:] if args is None else args) if not word.startswith("-")), None)


def unexpected(error: Exception, command: str | None = None) -> str:
    """Describe an unexpected error of `command` in one line; running out of memory or disk space has its own text."""
    name = type(error).__name__
    if lacks_memory(error):
        remedy = "lower the batch sizes of the recipe or use a machine with more memory"
        return f"out of memory; {LESS_MEMORY.get(command or '', remedy)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full{f': cannot write {error.filename}' if error.filename else ''}; free some space"
    message = " ".join(str(error).split())
    return f"{name}: {message} (unexpected; `mla-convert --debug ...` or {DEBUG}=1 shows the traceback)"
