"""DISLoss: chunks of the teacher, learning, processes, and refusals."""

import pytest
import torch

from hf_dis import DISLoss, SamplerSpec, make_sampler


@pytest.fixture
def batch():
    """Features, head and teacher logits of 6 items and 40 classes, float64; DISLoss takes them in this order."""
    shapes = [(6, 5), (40, 5), (40,), (6, 40)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_takes_teacher_logits_in_chunks(batch):
    *head, teacher = batch
    labels = torch.arange(6)
    whole, chunked = (DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8), seed=1)) for _ in range(2))
    for _ in range(3):
        expected = whole(*head, teacher, labels)
        torch.testing.assert_close(chunked(*head, (chunk for chunk in teacher.split(4)), labels), expected)


def test_learns_from_every_batch_and_leaves_the_teacher_without_gradient(batch):
    features, weight, bias, teacher = (tensor.requires_grad_() for tensor in batch)
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=8, num_shared_classes=4, rank_depth=10))
    before = {name: value.clone() for name, value in sampler.proposal.state_dict().items()}
    DISLoss(sampler)(features, weight, bias, teacher).backward()
    assert all(not torch.equal(value, before[name]) for name, value in sampler.proposal.state_dict().items())
    assert teacher.grad is None and features.grad is not None
    assert all(not value.requires_grad for value in sampler.proposal.state_dict().values())


def test_sums_statistics_over_processes(batch):
    """Two processes that saw the same batch learn what one learns from it."""
    alone, together = (
        make_sampler(40, SamplerSpec(num_sampled_classes=8, num_shared_classes=4, rank_depth=10)) for _ in range(2)
    )
    DISLoss(alone)(*batch)
    DISLoss(together, reduce=lambda statistics: {name: 2 * value for name, value in statistics.items()})(*batch)
    for name, value in alone.proposal.state_dict().items():
        torch.testing.assert_close(together.proposal.state_dict()[name], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("hard_label_weight", 1.5), ("hard_label_weight", -0.1)],
)
def test_refuses_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DISLoss(make_sampler(40), **{name: value})


def test_refuses_a_head_of_other_classes(batch):
    with pytest.raises(ValueError, match=r"30.*40"):
        DISLoss(make_sampler(30, SamplerSpec(num_sampled_classes=8)))(*batch)


@pytest.mark.parametrize("num_classes", [30, 50])
def test_refuses_a_teacher_of_other_classes(batch, num_classes):
    *head, _ = batch
    with pytest.raises(ValueError, match=rf"logits of {num_classes} classes, the student of 40"):
        DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8)))(*head, torch.randn(6, num_classes))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_refuses_nan_and_learns_nothing_from_it(batch, bad):
    *head, teacher = batch
    teacher[4, 7] = bad
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=8))
    before = {name: value.clone() for name, value in sampler.proposal.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in items \[4\]"):
        DISLoss(sampler)(*head, teacher.split(3))
    assert all(torch.equal(value, before[name]) for name, value in sampler.proposal.state_dict().items())


@pytest.mark.parametrize("label", [-1, 40])
def test_refuses_labels_out_of_range(batch, label):
    with pytest.raises(ValueError, match=rf"labels \[{label}\] are outside 0\.\.39"):
        DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8)))(*batch, torch.tensor([0, 1, 2, label, 4, 5]))


@pytest.mark.parametrize(
    ("position", "name"),
    [(1, "weight"), (2, "bias"), (3, "teacher_logits"), (4, "labels")],
)
def test_refuses_tensors_on_another_device(batch, position, name):
    given = [*batch, torch.arange(6)]
    given[position] = given[position].to("meta")
    with pytest.raises(ValueError, match=rf"{name} is on meta and the features are on cpu: bring {name} there"):
        loss = DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8)))
        loss._has_checked_values = True  # else the range of the labels is looked at first
        loss(*given)


def test_refuses_a_sampler_and_chunks_of_a_teacher_on_another_device(batch):
    *head, teacher = batch
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=8), device="meta")
    with pytest.raises(ValueError, match="the sampler is on meta and the features are on cpu: pass device to"):
        DISLoss(sampler)(*batch)
    with pytest.raises(ValueError, match="teacher_logits is on meta and the features are on cpu"):
        DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8)))(*head, [teacher[:3], teacher[3:].to("meta")])
