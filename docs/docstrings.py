"""An extension of griffe, which reads the docstrings: cross-references, and settings with their defaults."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator

import griffe
from mkdocs.plugins import get_plugin_logger

logger = get_plugin_logger("docstrings")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns ``:class:`name``` into links, and gives fields of dataclasses the defaults and the help that they have."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Runs when the package has been read."""
        for found in list(_objects(pkg)):
            if found.is_class and "dataclass" in found.labels:
                _settings(found)
            if found.docstring is not None:
                found.docstring.value = ROLE.sub(lambda match, owner=found: _link(match, owner), found.docstring.value)


def _objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _link(match: re.Match[str], owner: griffe.Object) -> str:
    """A link to a name of hf_dis, or the name alone where the reference does not have it."""
    name = match[2]
    shown = name.rpartition(".")[2] if match[1] else name
    path = _resolved(name, owner)
    if path is None:
        logger.warning("%s: the docstring names %s, which does not exist", owner.path, name)
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional>`{shown}`</autoref>'


def _resolved(name: str, owner: griffe.Object) -> str | None:
    """The path of a name as seen from an object's docstring, or None."""
    package = owner.package
    if name.startswith(f"{package.name}."):
        inside = name.removeprefix(f"{package.name}.")
        return name if _has(package, inside) else None
    scope: griffe.Object | griffe.Alias | None = owner
    while scope is not None:
        if _has(scope, name):
            return f"{scope.path}.{name}"
        scope = scope.parent
    return None


def _has(scope: griffe.Object | griffe.Alias, name: str) -> bool:
    """Returns True if a name can be reached from a scope through members, inherited and imported ones included."""
    for part in name.split("."):
        members = scope.all_members if scope.is_class else scope.members
        if part not in members:
            return False
        scope = members[part]
        if scope.is_alias:
            scope = scope.final_target
    return True


def _settings(found: griffe.Class) -> None:
    """Gives each field its default, and its help where the docstring of the class does not describe it."""
    owner = getattr(importlib.import_module(found.module.path), found.name)
    described = found.docstring.value if found.docstring else ""
    for field in dataclasses.fields(owner):
        attribute = found.members.get(field.name)
        if attribute is None:
            continue
        if field.default is not dataclasses.MISSING:
            attribute.value = repr(field.default)
        if "help" in field.metadata and not re.search(
            rf"^\s*(?:\w+, )*{field.name}(?:, \w+)*:", described, re.MULTILINE
        ):
            attribute.docstring = griffe.Docstring(field.metadata["help"], parent=attribute)
