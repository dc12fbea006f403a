"""The sample where each item holds all ranks that it samples from."""

import math
from unittest import mock

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.sampling.all_ranks import target_of
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.teacher.targets import TeacherTargets

SPEC = SamplerSpec(num_sampled_classes=6, num_shared_classes=12, num_tails=4, rank_depth=6)


@pytest.mark.parametrize("has_labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("num_items", [8, 10])
def test_it_is_the_sample_of_any_other_depth(has_labels, num_items):
    """Sampled like fewer ranks than there are, all of them come out certain."""
    logits = 3 * torch.randn(num_items, 80)
    ranked = logits.argsort(1, descending=True)[:, 2]
    labels = ranked.where(torch.arange(num_items) % 2 == 0, 79) if has_labels else None
    found, expected = (sampled(logits, labels, is_known) for is_known in (True, False))
    assert found.all_ranks_certain and not expected.all_ranks_certain and found.has_label == has_labels
    used = ~found.log_weights.isneginf()
    assert torch.equal(used, ~expected.log_weights.isneginf()) and not used.all()
    assert torch.equal(found.certain & used, expected.certain & used)
    for name in ("item_ids", "tail_ids", "ranks", "outside_top"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("log_weights", "log_probs", "target", "rank_weights", "class_mass"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)


def sampled(logits, labels, is_known):
    sampler = make_sampler(logits.shape[1], SPEC)
    targets = [TeacherTargets(logits, 2.0, sampler.rank_depth)]
    with mock.patch.object(ClassSampler, "_samples_all_ranks", is_known):
        return sampler.sample(targets, labels)


def test_uncertain_classes_share_what_certain_ones_leave():
    log_probs = torch.tensor([[0.5, 0.2, 0.1, 0.05], [0.6, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    log_weights = torch.tensor([[1, 0, 1, 3], [1, 1, 1, 4]], dtype=torch.float64).log()
    first, second = target_of(log_probs, log_weights, log_weights <= 0).tolist()
    assert first == pytest.approx([0.5, 0, 0.1, 0.4])  # 0.4 is left for the only other class
    assert second == pytest.approx([0.6 / 1.1, 0.3 / 1.1, 0.2 / 1.1, 0])  # nothing is left
    log_weights[1, 2] = math.log(2)
    shares = 0.2 * 2, 0.1 * 4
    rest = [0.1 * share / sum(shares) for share in shares]
    assert target_of(log_probs, log_weights, log_weights <= 0)[1].tolist() == pytest.approx([0.6, 0.3, *rest])


def test_a_target_without_a_class_to_carry_the_rest_sums_to_one():
    certain = torch.ones(1, 2, dtype=torch.bool)
    assert target_of(torch.tensor([[0.3, 0.1]]).log(), torch.zeros(1, 2), certain)[0].tolist() == pytest.approx(
        [0.75, 0.25]
    )
    assert target_of(torch.full((1, 2), -torch.inf), torch.zeros(1, 2), certain).tolist() == [[0, 0]]
