"""Runs recipes: the order of the steps, what each step writes, and how an interrupted run resumes."""

from .run import RunResult, run

__all__ = ["RunResult", "run"]
