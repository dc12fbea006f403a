"""Caches of data sets named by what their files hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets


@dataclass
class ContentConfig(datasets.BuilderConfig):
    """A configuration whose ``digest``, which each data set takes of its files, names the cache: other files under the
    same path never meet a stale one."""

    digest: str = field(init=False)

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        return super().create_config_id({"digest": self.digest}, custom_features)
