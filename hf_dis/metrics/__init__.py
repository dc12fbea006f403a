"""Metrics for the examples: `evaluate` modules that need no network."""

from hf_dis.metrics.accuracy import TopKAccuracy

__all__ = ["TopKAccuracy"]
