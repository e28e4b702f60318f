"""`mla-convert push`: uploads a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..distill.progress import Report, reporting
from ..errors import UsageError, few
from ..files import MANIFEST
from .options import Json
from .output import print_result, stderr


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, a checkpoint or an export.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub.")],
    create: Annotated[
        bool, typer.Option("--create", help="Create the repository, and the branch, if missing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="The branch; by default main.")] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request, or continue the one of an earlier push.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would change; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to the Hub in one commit; files that are already there are not sent again.

    The token comes from HF_TOKEN or from `hf auth login`.
    """
    if pull_request and revision is not None:
        raise UsageError("give --revision or --pull-request, not both; pull requests are opened against main")
    if message is not None and not message.strip():
        raise UsageError("--message is empty; write one, or leave it out")
    with stderr().status("loading PyTorch"):
        from ..export.hub import PushConfig
        from ..export.hub import push as push_checkpoint

    config = PushConfig(repo_id, create, private, revision, pull_request, dry_run, message)
    with _progress(stderr()) as report:
        result = push_checkpoint(folder, config, report)
    print_result(as_json, result, *_rendered(result))


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Report]:
    """Show a bar of bytes for each job, with the current file."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        # No partial bar stays on screen after an interruption; the result lists what was sent.
        transient=True,
    )
    with reporting(bars, decimal) as report:
        yield report


def _rendered(result: Mapping[str, Any]) -> list[RenderableType]:
    """Summarize what was sent, preceded by the list of files in a dry run and followed by the URL."""
    sent, kept, deleted = (result[key] for key in ("uploaded", "skipped", "deleted"))
    lines: list[RenderableType] = []
    if result["dry_run"]:
        table = Table("", "file", box=None)
        table.add_column("size", justify="right")
        for action, names in (("upload", sent), ("keep", kept), ("delete", deleted)):
            for name in names:
                size = result["sizes"].get(name)
                table.add_row(action, name, "" if size is None else decimal(size))
        lines.append(table)
    if result["left_out"]:
        lines.append(f"left out, as {MANIFEST} does not list them: {few(result['left_out'])}")
    if result["local_paths"]:
        lines.append(f"the files name paths of this machine: {few(result['local_paths'])}")
    if not (sent or deleted or result["created"]):
        return [*lines, f"nothing to do: {result['url']} has all {len(kept)} files"]
    verb = "would upload" if result["dry_run"] else "uploaded"
    text = f"{verb} {len(sent)} files, {decimal(result['bytes'])}; {len(kept)} are there already"
    if deleted:
        text += f"; {'would delete' if result['dry_run'] else 'deleted'} {len(deleted)}"
    return [*lines, text, result["pull_request"] or result["url"]]
