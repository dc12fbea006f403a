"""The adapter to transformers' Trainer."""
