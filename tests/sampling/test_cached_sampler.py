"""The sample for stored targets: the gradient of the stored target on average, and exactly with all classes."""

import pytest
import torch
from tiny_models import column_ids

from hf_dis import SamplerSpec
from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import sampled_forward_kl, sparse_forward_kl
from hf_dis.sampling.cached_sampler import TailProposal, make_cached_sampler
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets

C, N, TEMPERATURE = 50, 6, 2.0
LAYOUT = TargetLayout(C, 6, 8)


@pytest.fixture
def teacher_logits():
    return 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets(teacher_logits):
    return stored(teacher_logits, LAYOUT)


def stored(teacher_logits, layout):
    generator = torch.Generator().manual_seed(2)
    return CachedTargets(
        compact_targets(teacher_logits, TEMPERATURE, layout.depth, layout.sample_size, generator), layout.num_classes
    )


def dense(targets):
    return torch.zeros(N, C).scatter_add_(1, targets.ids, targets.target)


def columns(logits, sample):
    return logits.gather(1, column_ids(sample))


def student():
    return torch.randn(N, C, generator=torch.Generator().manual_seed(3)).requires_grad_()


def reference(logits, targets):
    """The gradient of the mean loss for the stored target, with every class of the student."""
    p = dense(targets).double()
    s = (logits.detach().double() / TEMPERATURE).softmax(1)
    return TEMPERATURE * (s - p) / N


def test_the_target_sums_to_one_and_its_entropy_is_the_teachers(teacher_logits, targets):
    torch.testing.assert_close(targets.target.sum(1), torch.ones(N))
    p = (teacher_logits / TEMPERATURE).log_softmax(1)
    negative_entropy = (targets.target * targets.log_probs).sum(1)
    torch.testing.assert_close(negative_entropy, (p.exp() * p).sum(1), rtol=0, atol=2e-5)


def test_a_class_that_was_stored_twice_is_one_column(teacher_logits):
    targets = stored(teacher_logits, TargetLayout(C, 0, 12))
    for item in range(N):
        ids = targets.ids[item, targets.used[item]]
        assert len(ids.unique()) == len(ids)
    assert not targets.used.all()


def test_with_all_classes_ranked_the_loss_is_the_exact_one(teacher_logits, dense_kd):
    layout = TargetLayout(C, C, 0)
    logits = student().detach().double().requires_grad_()
    targets = stored(teacher_logits.double(), layout)
    sample = make_cached_sampler(layout, SamplerSpec(num_sampled_classes=C)).sample([targets])
    loss = sampled_forward_kl(columns(logits, sample), sample, TEMPERATURE).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = dense_kd(logits, teacher_logits, TEMPERATURE)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected.sum(), logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("depth, samples", [(6, 8), (0, 12), (6, 0)])
@pytest.mark.parametrize("sizes", [{"num_sampled_classes": C}, {"num_shared_classes": C, "num_tails": 2}])
def test_sampling_all_classes_gives_the_gradient_of_the_stored_target(teacher_logits, depth, samples, sizes):
    layout, logits = TargetLayout(C, depth, samples), student()
    targets = stored(teacher_logits, layout)
    sample = make_cached_sampler(layout, SamplerSpec(**sizes)).sample([targets], torch.arange(N))
    loss = sampled_forward_kl(columns(logits, sample), sample, TEMPERATURE).loss
    (gradient,) = torch.autograd.grad(loss.mean(), logits)
    torch.testing.assert_close(gradient.double(), reference(logits, targets), rtol=0, atol=1e-6)
    sparse, slope = sparse_forward_kl(logits.detach(), targets.ids, targets.log_probs, targets.target, TEMPERATURE)
    torch.testing.assert_close(loss, sparse, rtol=0, atol=1e-5)
    torch.testing.assert_close(slope.double() / N, reference(logits, targets), rtol=0, atol=1e-6)


@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_sampled_classes": 25},
        {"num_shared_classes": 25},
        {"num_shared_classes": 25, "num_tails": 3},
        {"num_shared_classes": 25, "num_sampled_classes": 3},
    ],
    ids=["per item", "shared", "several tails", "some of the stored tail"],
)
def test_the_gradient_is_right_on_average(targets, sizes, proposal):
    logits, repeats = student(), 400
    sampler = make_cached_sampler(LAYOUT, SamplerSpec(proposal=proposal, proposal_floor=0.5, **sizes))
    total = torch.zeros(N, C)
    for _ in range(repeats):
        sample = sampler.sample([targets], torch.arange(N))
        result = sampled_forward_kl(columns(logits, sample), sample, TEMPERATURE)
        total += torch.autograd.grad(result.loss.mean(), logits)[0] / repeats
        sampler.learn(sample, result.signal)
    expected = reference(logits, targets).float()
    assert (total - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("sizes", [{"num_sampled_classes": C}, {"num_shared_classes": C, "num_tails": 2}])
def test_cross_entropy_reuses_the_sample(targets, dense_ce, sizes):
    logits, labels = student(), torch.arange(N) * 7 % C
    sample = make_cached_sampler(LAYOUT, SamplerSpec(**sizes)).sample([targets], labels)
    loss = sampled_cross_entropy(columns(logits, sample), sample)
    torch.testing.assert_close(loss.double(), dense_ce(logits, labels), rtol=0, atol=1e-5)


def test_each_class_counts_once_in_the_normaliser(targets):
    labels = targets.ids[:, -1]
    for sizes in ({"num_sampled_classes": 20}, {"num_shared_classes": 20}, {"num_shared_classes": 20, "num_tails": 2}):
        sample = make_cached_sampler(LAYOUT, SamplerSpec(**sizes)).sample([targets], labels)
        ids = column_ids(sample)
        for item in range(N):
            used = ids[item, sample.log_weights[item] > -torch.inf]
            assert len(used.unique()) == len(used)
            assert labels[item] in used


@pytest.mark.parametrize("kept", [1, 3, 7])
def test_each_class_of_the_stored_sample_is_used_as_often(targets, kept):
    """Distinct samples in every step, and over steps the target that was stored."""
    layout, repeats = LAYOUT, 2000
    sampler = make_cached_sampler(layout, SamplerSpec(num_shared_classes=20, num_sampled_classes=kept))
    total = torch.zeros(N, C)
    for _ in range(repeats):
        sample = sampler.sample([targets])
        assert sample.item_ids.shape[1] == sampler.num_stored == layout.depth + kept
        tail = sample.item_ids[:, layout.depth :]
        assert (tail.diff(dim=1) >= 0).all()
        total.scatter_add_(1, sample.item_ids, sample.target[:, : sampler.num_stored] / repeats)
    # A tail class stands for up to its whole mass in the steps that use it.
    tail_mass = targets.compact.log_tail_mass.exp().max()
    assert (total - dense(targets)).abs().max() < 5 * tail_mass / (kept * repeats) ** 0.5


def test_no_more_is_used_than_is_stored(targets):
    whole = make_cached_sampler(LAYOUT, SamplerSpec(num_shared_classes=20, num_sampled_classes=LAYOUT.sample_size))
    more = make_cached_sampler(LAYOUT, SamplerSpec(num_shared_classes=20))
    samples = [sampler.sample([targets]) for sampler in (whole, more)]
    assert torch.equal(samples[0].item_ids, samples[1].item_ids) and torch.equal(samples[0].target, samples[1].target)
    assert more.columns == LAYOUT.num_stored + 20


def test_the_shared_tail_learns_where_the_student_is(targets):
    logits = torch.zeros(N, C)
    wrong = next(c for c in range(C) if not (targets.ids == c).any())
    logits[:, wrong] = 6
    sampler = make_cached_sampler(LAYOUT, SamplerSpec(num_shared_classes=20))
    for _ in range(30):
        sample = sampler.sample([targets])
        signal = sampled_forward_kl(columns(logits, sample), sample, TEMPERATURE).signal
        sampler.learn(sample, signal)
    assert isinstance(sampler.proposal, TailProposal)
    assert sampler.proposal.class_density().values.argmax() == wrong


def test_the_class_mass_is_unbiased(teacher_logits):
    many = teacher_logits[:1].expand(3000, C)
    mass = stored(many, LAYOUT).class_mass() / 3000
    p = (teacher_logits[0] / TEMPERATURE).softmax(0)
    p[p.topk(LAYOUT.depth).indices] = 0
    torch.testing.assert_close(mass, p, rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rank_depth": 5}, "rank_depth is 5.*None or 6, the ranks that the cache holds"),
        ({"proposal": "topk"}, "proposal is 'topk'.*another with a cache"),
        ({"num_sampled_classes": 0}, "num_sampled_classes is 0"),
    ],
)
def test_what_is_not_stored_cannot_be_asked_for(given, message):
    with pytest.raises(ValueError, match=message):
        make_cached_sampler(LAYOUT, SamplerSpec(**given))
