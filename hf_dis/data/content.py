"""Caches of datasets named by the content of their files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets


@dataclass
class ContentConfig(datasets.BuilderConfig):
    """A configuration whose ``digest`` names the cache: other files under the same path never meet a stale cache.

    Attributes:
        digest: of the files' content, set by each dataset.
    """

    digest: str = field(init=False)

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        """Names the cache by the digest alone."""
        return super().create_config_id({"digest": self.digest}, custom_features)
