"""Losses per item: divergences from the teacher, and cross-entropy."""
