"""A head spread over real processes (gloo): logits, losses and gradients are those of the whole head."""

import pytest
import shards_worker as worker
import torch
from launch import processes

from hf_dis.head.vocab_shard import VocabShard


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    return processes(request.param, worker.__file__, tmp_path_factory.mktemp(f"processes_{request.param}"))


def cases(ranks, kind):
    found = [{name: rank[name] for name in rank if name[0] == kind} for rank in ranks]
    assert found[0] and all(one.keys() == found[0].keys() for one in found)
    return [(name, *one[name]) for one in found for name in one]


@pytest.mark.parametrize("kind", ["same items", "own items", "all classes"])
def test_logits_and_gradients_are_those_of_the_whole_head(ranks, kind):
    for name, found, expected in cases(ranks, kind):
        in_bfloat16 = kind == "own items" and name[2]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            # The parts of a gradient are rounded to bfloat16 before they are summed.
            atol = 2e-2 * float(other.abs().amax()) if in_bfloat16 and other.numel() else 1e-12
            torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_in_two_groups_of_two_are_those_of_whole_heads(ranks):
    if len(ranks) == 2:
        return
    for name, found, expected in cases(ranks, "DISLoss"):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sample_of_updated_rows_is_unbiased_and_small(ranks):
    for rank in ranks:
        (found,), (expected,) = rank["updates"]
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.3)
    updated = torch.tensor([rank["updated"] for rank in ranks]).double()
    assert updated[:, 0].sum() > 1.5 * updated[:, 1:].mean(1).sum()


@pytest.mark.parametrize("bounds", [(3, 3), (4, 3), (-1, 2)])
def test_a_shard_without_a_class_is_refused(bounds):
    with pytest.raises(ValueError, match=f"from {bounds[0]} up to {bounds[1]}.*fewer processes"):
        VocabShard(*bounds)
