"""The columns of a batch that only one of two models takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from hf_dis.models.tasks import base_model


def separate_columns(student: nn.Module, teacher: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Finds the columns that one model's forward names and the other model does not take.

    A forward outside transformers that accepts any keyword takes every column. Forwards of transformers accept
    keywords for other ends.

    Args:
        student, teacher: the models, in a PEFT model or not.

    Returns:
        the columns for the student alone, and the columns for the teacher alone.
    """
    mine, theirs = forward_columns(student), forward_columns(teacher)
    only_mine = frozenset() if takes_any(teacher) else mine - theirs
    only_theirs = frozenset() if takes_any(student) else theirs - mine
    return only_mine, only_theirs


def forward_columns(model: nn.Module) -> frozenset[str]:
    """Lists the parameters that a model's forward names."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(one.name for one in _parameters(model).values() if one.kind in by_name)


def takes_any(model: nn.Module) -> bool:
    """Returns True if a model's forward takes every column: it accepts any keyword and is not of transformers."""
    is_own = not base_model(model).forward.__module__.startswith("transformers.")
    return is_own and any(one.kind is one.VAR_KEYWORD for one in _parameters(model).values())


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(base_model(model).forward).parameters
