"""The command line: ``hf-dis estimate``, ``hf-dis cache`` and ``hf-dis report``."""
