"""Adapters to hosts that are packages of their own; each is imported by its module and needs an extra of hf_dis."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def require(package: str, lowest: str) -> None:
    """Makes sure that a host's package can be used; its extra has the package's name.

    Args:
        package: its name.
        lowest: the lowest version that the adapter works with.

    Raises:
        ImportError: if the package is missing or too old; names the version found, the one needed, and the extra.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(lowest):
        state = "not installed" if found is None else f"installed as version {found}"
        raise ImportError(
            f"hf_dis.integrations.{package} needs {package} {lowest} or newer, and {package} is {state}: run "
            f'pip install "hf_dis[{package}]"'
        )
