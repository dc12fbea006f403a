"""The sampled classes of a head and their loss in one pass over the rows of W."""
