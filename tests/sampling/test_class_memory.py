"""The proposal over classes: finds the classes that disagree, and follows the teacher's marginal."""

import pytest
import torch
from tiny_models import column_ids

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.teacher.targets import TeacherTargets


def test_the_class_memory_finds_the_classes_that_disagree():
    """Planted: classes 50..59 are where the student is wrong. Known only from sampled classes, after 60 steps."""
    num_classes, temperature = 60, 1.0
    teacher = torch.randn(16, num_classes) * 0.3
    teacher[:, :5] += 5  # every item's top
    student = teacher.clone()
    student[:, 50:] += torch.linspace(2, 4, 10)
    dis = make_sampler(num_classes, SamplerSpec(num_sampled_classes=5, num_shared_classes=12, rank_depth=5))
    for _ in range(60):
        sample = dis.sample([TeacherTargets(teacher, temperature, 5)])
        ids = column_ids(sample)
        dis.learn(sample, sampled_forward_kl(student.gather(1, ids), sample, temperature).signal)
    gap = (student.softmax(1) - teacher.softmax(1)).square().mean(0).sqrt()[5:].double()
    found = dis.proposal.memory.density(floor=0.0, signal_share=1.0).values[5:]
    torch.testing.assert_close(found[-10:] / found.sum(), gap[-10:] / gap.sum(), rtol=0.4, atol=0)
    assert found[-10:].min() > found[:-10].max()


def test_the_class_memory_keeps_the_teachers_marginal_outside_the_tops():
    teacher = torch.randn(8, 20)
    p, top = teacher.softmax(1), teacher.topk(3).indices
    expected = p.scatter(1, top, 0).mean(0)
    dis = make_sampler(20, SamplerSpec(num_sampled_classes=3, num_shared_classes=4, rank_depth=3, proposal_decay=0.0))
    sample = dis.sample([TeacherTargets(chunk, 1.0, 3) for chunk in teacher.split(3)])
    dis.learn(sample, torch.zeros_like(sample.log_weights))
    torch.testing.assert_close(dis.proposal.memory.marginal, expected)


def test_the_class_memory_ignores_classes_inside_the_top_of_an_item():
    """Classes in the top of every item are met by no item as tail: their values in the memory stay."""
    teacher = torch.zeros(4, 10)
    teacher[:, :3] = 5
    dis = make_sampler(10, SamplerSpec(num_sampled_classes=3, num_shared_classes=10, rank_depth=3))
    before = dis.proposal.memory.squared_signal.clone()
    sample = dis.sample([TeacherTargets(teacher, 1.0, 3)])
    dis.learn(sample, torch.ones_like(sample.log_weights))
    after = dis.proposal.memory.squared_signal
    assert torch.equal(after[:3], before[:3]) and (after[3:] > 0.2).all()


def test_the_class_density_is_positive_and_sums_to_one():
    memory = ClassMemory(50, 0.9)
    for share in (0.0, 0.5):
        density = memory.density(0.05, share).values
        assert density.min() > 0
    memory.marginal.uniform_()
    density = memory.density(0.05).values
    assert density.sum() == pytest.approx(1) and density.min() >= 0.05 / 50
