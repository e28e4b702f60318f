"""The order of a run: what is done, what follows, and how an interrupted run goes on."""

from .run import RunResult, run

__all__ = ["RunResult", "run"]
