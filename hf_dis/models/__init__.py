"""Models: their task, vocabulary, output head and provenance."""
