"""Namespace of the ops. kernel-builder replaces this file with one whose namespace is unique to the build."""

from __future__ import annotations

import torch

NAMESPACE = "mla_attention"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` in the form `torch.library` expects: `namespace::op_name`."""
    return f"{NAMESPACE}::{op_name}"
