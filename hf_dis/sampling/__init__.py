"""Sampling of classes: designs, proposals, samplers."""
