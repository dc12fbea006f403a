"""Columns of a batch that only one of two models takes."""

from __future__ import annotations

import inspect

from torch import nn

from hf_dis.models.tasks import base_model


def separate_columns(student: nn.Module, teacher: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """The columns that only the student's forward names, and those that only the teacher's forward names.

    A teacher outside transformers whose forward takes any keyword is given all columns.

    Returns:
        names for the student alone, and names for the teacher alone.
    """
    mine, theirs = forward_columns(student), forward_columns(teacher)
    if _takes_any(teacher) and not hasattr(base_model(teacher), "config"):
        return frozenset(), theirs - mine
    return mine - theirs, theirs - mine


def forward_columns(model: nn.Module) -> frozenset[str]:
    """The parameters that a model's forward names."""
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    return frozenset(one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))


def _takes_any(model: nn.Module) -> bool:
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)
