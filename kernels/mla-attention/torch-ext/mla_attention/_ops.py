"""The namespace of the ops. kernel-builder replaces this file by one that is unique to a build."""

from __future__ import annotations

import torch

NAMESPACE = "mla_attention"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` as `torch.library` wants it, `namespace::op_name`."""
    return f"{NAMESPACE}::{op_name}"
