"""Metrics for the examples: ``evaluate`` modules that need no network."""

from hf_dis.metrics.accuracy import TopKAccuracy
from hf_dis.metrics.next_item import NextItem, next_item_scores, top_ranked
from hf_dis.metrics.reid import ReID, reid_scores

__all__ = ["NextItem", "ReID", "TopKAccuracy", "next_item_scores", "reid_scores", "top_ranked"]
