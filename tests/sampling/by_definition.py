"""Inclusion probabilities by their definition, and frequencies to compare with them."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def capped_slowly(density, num_sampled):
    """π by definition: scale to K, fix whatever exceeds one at one, scale the rest again, until nothing does."""
    capped = torch.zeros_like(density, dtype=torch.bool)
    while True:
        kappa = (num_sampled - capped.sum()) / density[~capped].sum()
        exceeding = ~capped & (kappa * density > 1)
        if not exceeding.any():
            return torch.where(capped, 1.0, kappa * density)
        capped |= exceeding


def frequencies(sampled, num_values):
    return torch.bincount(sampled.flatten(), minlength=num_values).double() / len(sampled)


def within_five_sigma(observed, expected, num_trials):
    sigma = (expected * (1 - expected) / num_trials).clamp_min(0).sqrt()
    return bool(((observed - expected).abs() <= 5 * sigma + 1e-12).all())
