"""The target of a stratum, and items that statistics leave out."""

from dataclasses import replace

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.sampling.sample import Stratum
from hf_dis.teacher.targets import TeacherTargets

# A stratum


def stratum():
    """Four classes of a stratum of mass 0.8: the first certain, the last not used."""
    log_probs = torch.tensor([[0.4, 0.2, 0.1, 0.05]], dtype=torch.float64).log()
    log_weights = torch.tensor([[1.0, 2.0, 4.0, 0.0]], dtype=torch.float64).log()
    certain = torch.tensor([[True, False, False, False]])
    return Stratum(torch.tensor([[7, 5, 3, 1]]), log_weights, certain, log_probs, torch.tensor([0.8]).double())


def test_the_target_keeps_certain_classes_and_sums_to_the_mass():
    torch.testing.assert_close(stratum().target(), torch.tensor([[0.4, 0.2, 0.2, 0.0]], dtype=torch.float64))


def test_mass_that_no_sampled_class_could_carry_is_left_out():
    log_weights = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]], dtype=torch.float64)
    certain = stratum()._replace(certain=torch.ones(1, 4, dtype=torch.bool), log_weights=log_weights)
    torch.testing.assert_close(certain.target(), torch.tensor([[0.4, 0.2, 0.1, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("label", "held", "expected"),
    [
        (7, True, [0.0, 0.2, 0.2, 0.0]),  # certain: its own mass goes
        (5, True, [0.4, 0.0, 0.2, 0.0]),  # random: the other takes what is left
        (9, True, [0.4, 0.1, 0.1, 0.0]),  # not sampled here, but of this stratum
        (9, False, [0.4, 0.2, 0.2, 0.0]),  # of a different stratum
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


# Items that statistics leave out


def sampler_and_sample(num_items=4):
    sampler = make_sampler(30, SamplerSpec(num_sampled_classes=3, num_shared_classes=5, num_tails=1, rank_depth=6))
    return sampler, sampler.sample([TeacherTargets(torch.randn(num_items, 30), 2.0, 6)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_item_is_finite_if_its_signal_is_at_every_column_that_it_uses(bad):
    _, sample = sampler_and_sample()
    sample.log_weights[:, 6] = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    signal = torch.rand(4, 8)
    signal[:2, 6] = bad
    assert sample.finite_items(signal).tolist() == [False, True, True, True]


def test_items_left_out_have_no_weight():
    """Their signal and weights may be NaN: the statistics are those of the other items alone."""
    sampler, sample = sampler_and_sample()
    finite = torch.tensor([True, False, True, False])
    signal = torch.rand(4, sample.log_weights.shape[1])
    of_none = signal.masked_fill(~finite[:, None], 0)
    expected = sampler.proposal.statistics(replace(sample, outside_top=sample.outside_top & finite[:, None]), of_none)
    sample.rank_weights[1] = torch.nan  # a proposal that follows a teacher of NaN
    signal[~finite] = torch.nan
    found = sampler.proposal.statistics(replace(sample, finite=finite), signal)
    assert torch.equal(found["rank_squared"], expected["rank_squared"])
    assert torch.equal(found["tail"]._values(), expected["tail"]._values())
    assert found["tail"]._values()[:, 1].sum() == sample.outside_top[finite].sum()
