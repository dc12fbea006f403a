"""Metrics for the examples: ``evaluate`` modules that need no network."""

from hf_dis.metrics.accuracy import TopKAccuracy
from hf_dis.metrics.reid import ReID, reid_scores

__all__ = ["ReID", "TopKAccuracy", "reid_scores"]
