"""The target of a stratum, and items that statistics leave out."""

import pytest
import torch

from hf_dis.sampling.sample import Stratum

# A stratum


def stratum():
    """Four classes of a stratum of mass 0.8: the first certain, the last not used."""
    log_probs = torch.tensor([[0.4, 0.2, 0.1, 0.05]], dtype=torch.float64).log()
    log_weights = torch.tensor([[1.0, 2.0, 4.0, 0.0]], dtype=torch.float64).log()
    certain = torch.tensor([[True, False, False, False]])
    return Stratum(torch.tensor([[7, 5, 3, 1]]), log_weights, certain, log_probs, torch.tensor([0.8]).double())


def test_the_target_keeps_certain_classes_and_sums_to_the_mass():
    torch.testing.assert_close(stratum().target(), torch.tensor([[0.4, 0.2, 0.2, 0.0]], dtype=torch.float64))


def test_mass_that_nothing_drawn_could_carry_is_left_out():
    certain = stratum()._replace(certain=torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(certain.target(), torch.tensor([[0.4, 0.2, 0.1, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("label", "held", "expected"),
    [
        (7, True, [0.0, 0.2, 0.2, 0.0]),  # certain: its own mass goes
        (5, True, [0.4, 0.0, 0.2, 0.0]),  # random: the other takes what is left
        (9, True, [0.4, 0.1, 0.1, 0.0]),  # not sampled here, but of this stratum
        (9, False, [0.4, 0.2, 0.2, 0.0]),  # of another stratum
    ],
)
def test_a_stratum_gives_way_to_the_label(label, held, expected):
    """0.4 for class 7, 0.2 for any other."""
    mass = torch.tensor([0.4 if label == 7 else 0.2], dtype=torch.float64)
    own = Stratum(
        torch.tensor([[label]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), mass[:, None].log(), mass
    )
    found = stratum().without(own, torch.tensor([held])).target()
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
