"""Diagnostics of a run, and its report."""
