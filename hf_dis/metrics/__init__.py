"""Metrics for the examples: `evaluate` modules that need no network."""

from hf_dis.metrics.accuracy import TopKAccuracy
from hf_dis.metrics.reid import ReID

__all__ = ["ReID", "TopKAccuracy"]
