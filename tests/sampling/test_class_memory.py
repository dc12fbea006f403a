"""The proposal over classes: finds the classes that disagree, and follows the teacher's marginal."""

import pytest
import torch
from tiny_models import column_ids

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.sampling import class_memory
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


STEPS = 3
NUM_CLASSES = 90


@pytest.fixture
def three_steps(monkeypatch):
    """A density serves three steps."""
    monkeypatch.setattr(class_memory, "CLASSES_PER_STEP", NUM_CLASSES // STEPS)


def random_statistics(seed, num_items=6.0, is_sparse=True):
    generator = torch.Generator().manual_seed(seed)
    ids, mass_ids = (torch.randint(NUM_CLASSES, (1, size), generator=generator) for size in (12, 30))
    met = torch.rand(12, 2, generator=generator) * torch.tensor([1.0, 3.0])
    mass = torch.sparse_coo_tensor(mass_ids, torch.rand(30, generator=generator), (NUM_CLASSES,))
    return {
        "tail": torch.sparse_coo_tensor(ids, met, (NUM_CLASSES, 2), check_invariants=False),
        "class_mass": mass if is_sparse else mass.to_dense(),
        "items": torch.tensor(num_items),
        "not_finite": torch.tensor(0.0),
    }


def marginal(memory):
    return memory.marginal * memory.marginal_scale


def test_a_density_over_many_classes_serves_several_steps(three_steps):
    """The density follows every third step, and then all that was learnt; the running means follow every step."""
    memory, every_step = ClassMemory(NUM_CLASSES, 0.9), ClassMemory(NUM_CLASSES, 0.9)
    every_step.steps_per_density, before = 1, None
    for step in range(10):
        density, expected = memory.density(0.05).values, every_step.density(0.05).values
        if step % STEPS == 0:
            torch.testing.assert_close(density, expected, rtol=1e-5, atol=0)
        else:
            assert density is before and not torch.allclose(density, expected, rtol=1e-3, atol=0)
        before = density
        for one in (memory, every_step):
            one.update(random_statistics(step))
        assert torch.equal(memory.squared_signal, every_step.squared_signal)
        torch.testing.assert_close(marginal(memory), every_step.marginal, rtol=1e-5, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.9])
@pytest.mark.parametrize("num_items", [0.0, 6.0])
def test_the_marginal_is_exact_without_a_pass_over_all_classes(three_steps, decay, num_items):
    """Also where nothing asks for a density for long, and where a step has a dense mass, no item, or a mass of Inf."""
    memory, every_step = ClassMemory(NUM_CLASSES, decay), ClassMemory(NUM_CLASSES, decay)
    every_step.steps_per_density = 1
    for one in (memory, every_step):
        one.marginal.copy_(torch.rand(NUM_CLASSES, generator=torch.Generator().manual_seed(0)))
    for step in range(12):
        for one in (memory, every_step):
            one.update(random_statistics(step, num_items, is_sparse=step % 5 != 4))
        torch.testing.assert_close(marginal(memory), every_step.marginal, rtol=1e-5, atol=1e-12)
    statistics = random_statistics(99)
    statistics["class_mass"]._values()[:3] = torch.tensor([torch.inf, torch.nan, -1.0])
    memory.update(statistics)
    assert marginal(memory).isfinite().all() and marginal(memory).min() >= 0


def test_a_restored_memory_continues_to_the_bit(three_steps):
    memory, other = ClassMemory(NUM_CLASSES, 0.9), ClassMemory(NUM_CLASSES, 0.9)
    for step in range(4):
        memory.density(0.05)
        memory.update(random_statistics(step))
    other.load_state_dict({name: value.clone() for name, value in memory.state_dict().items()})
    for step in range(4, 9):
        assert torch.equal(memory.density(0.05).values, other.density(0.05).values)
        for one in (memory, other):
            one.update(random_statistics(step))
        for name, value in memory.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
