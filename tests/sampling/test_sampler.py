"""ClassSampler: the layout of a sample, the label in it, its stream of samples, and the arguments of make_sampler."""

from dataclasses import fields

import pytest
import torch
from tiny_models import column_ids

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import TeacherTargets

LAYOUTS = {
    "per item": {"num_shared_classes": 0, "design": "pps"},
    "per item, replacement": {"num_shared_classes": 0, "design": "replacement"},
    "two strata": {"num_shared_classes": 8, "design": "pps"},
    "two strata, several tails": {"num_shared_classes": 8, "num_tails": 3, "design": "pps"},
}


def one_step(sampler, step):
    """Samples and learns from logits of teacher and student that depend on the step alone."""
    seeded = torch.Generator().manual_seed(step)
    sample = sampler.sample([TeacherTargets(torch.randn(8, 30, generator=seeded), 2.0, sampler.rank_depth)])
    logits = torch.randn(8, sample.log_weights.shape[1], generator=seeded)
    sampler.learn(sample, sampled_forward_kl(logits, sample, 2.0).signal)
    return sample


# What a sample estimates


def test_target_is_unbiased_where_the_ratio_step_is_exact():
    """Sampled in proportion to p, ω·p is the same for all random classes, so that the ratio is without error."""
    logits = torch.randn(1, 40, dtype=torch.float64) * 2
    num_items, teacher = 40_000, logits.softmax(1)[0]
    sampler = make_sampler(
        40,
        SamplerSpec(
            num_sampled_classes=8, num_shared_classes=0, proposal="teacher", proposal_floor=1e-12, rank_depth=40
        ),
    )
    sample = sampler.sample([TeacherTargets(logits.expand(num_items, -1), 1.0, 40)])
    summed = torch.zeros(40, dtype=torch.float64).index_add_(0, sample.item_ids.flatten(), sample.target.flatten())
    # A random class carries the same share whenever it is sampled, which is with probability p / share.
    share = sample.target[~sample.certain].mean()
    sigma = (teacher * (share - teacher).clamp_min(0) / num_items).sqrt()
    assert ((summed / num_items - teacher).abs() <= 5 * sigma + 1e-9).all()


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_make_every_sum_over_classes_unbiased(layout, proposal, labelled):
    """E Σ_sampled ω f = Σ f for any f (Horvitz-Thompson): no class is missed, none counts twice."""
    logits = torch.randn(6, 30) * 2
    sampler = make_sampler(30, SamplerSpec(num_sampled_classes=6, rank_depth=10, proposal=proposal, **layout), seed=3)
    for step in range(5):  # makes the proposals uneven
        one_step(sampler, step)
    values = torch.rand(6, 30, dtype=torch.float64)
    rounds, copies = (150, 40) if layout["num_shared_classes"] else (20, 300)
    labels = torch.tensor([0, 5, 11, 17, 23, 29]).repeat(copies) if labelled else None
    repeated = TeacherTargets(logits.repeat(copies, 1), 2.0, 10)
    sums = []
    for _ in range(rounds):
        sample = sampler.sample([repeated], labels)
        ids = column_ids(sample)
        sums.append((sample.log_weights.double().exp() * values.repeat(copies, 1).gather(1, ids)).sum(1))
    sums = torch.stack(sums).view(rounds, copies, 6)
    sigma = sums.mean(1).std(0) / rounds**0.5
    assert ((sums.mean((0, 1)) - values.sum(1)).abs() <= 5 * sigma + 1e-6).all()


# The layout


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_label_is_sampled_for_certain_and_counted_once(layout):
    sampler = make_sampler(30, SamplerSpec(num_sampled_classes=6, rank_depth=10, **layout))
    labels = torch.arange(300) % 30
    sample = sampler.sample([TeacherTargets(torch.randn(300, 30), 2.0, 10)], labels)
    assert torch.equal(sample.item_ids[:, sample.label_column], labels)
    assert (sample.log_weights[:, sample.label_column] == 0).all() and sample.certain[:, sample.label_column].all()
    ids = column_ids(sample)
    used = sample.log_weights > -torch.inf
    assert ((ids == labels[:, None]) & used).sum(1).eq(1).all()
    assert (ids == labels[:, None]).sum(1).gt(1).any(), "no label met a sampled class: the test tests nothing"
    torch.testing.assert_close(sample.target.sum(1), torch.ones(300))
    assert (sample.target[~used] == 0).all()
    if layout["design"] == "pps":  # no class is used twice
        assert all(len(set(item[mask].tolist())) == mask.sum() for item, mask in zip(ids, used, strict=True))


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
def test_top_and_tail_carry_the_teachers_exact_mass(labelled):
    """For labels in the top and labels in the tail."""
    logits, labels = 2 * torch.randn(60, 30), torch.arange(60) % 30
    p, top = (logits / 2.0).softmax(1), logits.topk(10).indices
    expected = p.gather(1, top).sum(1)
    sampler = make_sampler(30, SamplerSpec(num_sampled_classes=6, num_shared_classes=12, rank_depth=10))
    sample = sampler.sample([TeacherTargets(logits, 2.0, 10)], labels if labelled else None)
    ids = column_ids(sample)
    in_top = (ids[:, :, None] == top[:, None]).any(2)
    torch.testing.assert_close((sample.target * in_top).sum(1), expected)
    torch.testing.assert_close((sample.target * ~in_top).sum(1), 1 - expected)


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chunks_join_to_the_sample_of_the_whole_batch(layout, labelled):
    logits, labels = torch.randn(10, 30), torch.arange(10) if labelled else None

    def sample(*sizes):
        sampler = make_sampler(30, SamplerSpec(num_sampled_classes=6, rank_depth=10, **layout))
        return sampler.sample((TeacherTargets(chunk, 2.0, 10) for chunk in logits.split(sizes)), labels)

    whole, joined = sample(10), sample(4, 4, 2)
    for name in (field.name for field in fields(ClassSample)):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), msg=name)


@pytest.mark.parametrize("num_items", [0, 1, 3, 5, 6])
def test_statistics_have_as_many_entries_for_any_number_of_items(num_items):
    """Processes with other numbers of items gather these entries side by side."""
    sampler = make_sampler(30, SamplerSpec(num_sampled_classes=2, num_shared_classes=4, num_tails=5))
    chunks = torch.randn(num_items, 30).split(2) if num_items else [torch.empty(0, 30)]
    sample = sampler.sample(TeacherTargets(chunk, 2.0, sampler.rank_depth) for chunk in chunks)
    signal = torch.rand(num_items, sample.log_weights.shape[1])
    tail = sampler.proposal.statistics(sample, signal)["tail"]
    assert len(sample) == num_items and tail._values().shape == (20, 2)
    assert int(tail._values()[:, 1].sum()) == int(sample.outside_top.sum())


def test_topk_takes_the_k_best_classes():
    logits = torch.randn(4, 50)
    sampler = make_sampler(50, SamplerSpec(num_sampled_classes=8, proposal="topk"))
    sample = sampler.sample([TeacherTargets(logits, 2.0, sampler.rank_depth)])
    assert torch.equal(sample.item_ids.sort(1).values, logits.topk(8).indices.sort(1).values)
    assert sample.certain.all() and sample.tail_ids.shape == (1, 0)


@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform", "topk"])
@pytest.mark.parametrize(
    ("num_classes", "num_sampled", "num_shared", "depth"),
    [
        (1, 1, 0, 1),
        (1, 5, 4, 9),
        (2, 1, 1, 1),
        (5, 1, 0, 9),
        (5, 1, 9, 3),
        (7, 7, 0, 7),
        (7, 3, 50, 4),
        (7, 9, 9, None),
    ],
)
def test_smallest_and_largest_sizes_sample(num_classes, num_sampled, num_shared, depth, proposal):
    sizes = {"num_sampled_classes": num_sampled, "num_shared_classes": num_shared, "rank_depth": depth}
    sampler = make_sampler(num_classes, SamplerSpec(proposal=proposal, **sizes))
    for labels in (None, torch.arange(8) % num_classes):
        sample = sampler.sample([TeacherTargets(torch.randn(8, num_classes), 2.0, sampler.rank_depth)], labels)
        assert sample.item_ids.min() >= 0 and sample.item_ids.max() < num_classes
        assert not sample.log_weights.isnan().any() and sample.log_weights.max() < torch.inf
        torch.testing.assert_close(sample.target.sum(1), torch.ones(8))
        sampler.learn(sample, torch.rand_like(sample.log_weights))


# The stream


@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform", "topk"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_state_continues_the_stream_to_the_bit(layout, proposal):
    def fresh(seed):
        return make_sampler(
            30, SamplerSpec(num_sampled_classes=6, rank_depth=10, proposal=proposal, **layout), seed=seed
        )

    original = fresh(1)
    for step in range(3):
        one_step(original, step)
    state = {name: value.clone() for name, value in original.state_dict().items()}
    restored = fresh(2)
    restored.load_state_dict(state)
    for step in range(3, 6):
        expected, found = one_step(original, step), one_step(restored, step)
        for name in ("item_ids", "tail_ids", "log_weights", "target"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_the_seed_makes_the_stream():
    def ids(seed):
        return one_step(
            make_sampler(30, SamplerSpec(num_sampled_classes=6, num_shared_classes=0), seed=seed), 0
        ).item_ids

    assert torch.equal(ids(1), ids(1)) and not torch.equal(ids(1), ids(2))


# Arguments


@pytest.mark.parametrize(("proposal", "shared"), [("topk", 0), ("dis", 4)])
def test_k_beyond_the_ranks_that_are_sampled_from_is_refused(proposal, shared):
    with pytest.raises(ValueError, match="rank_depth is 5, and num_sampled_classes is 8"):
        make_sampler(
            50, SamplerSpec(num_sampled_classes=8, num_shared_classes=shared, rank_depth=5, proposal=proposal)
        )


def test_the_ranking_is_resolved_to_k_or_to_twice_k_without_a_shared_tail():
    assert make_sampler(1_000, SamplerSpec(num_sampled_classes=30)).rank_depth == 30
    per_item = SamplerSpec(num_sampled_classes=30, num_shared_classes=0)
    assert make_sampler(1_000, per_item).rank_depth == 60 and make_sampler(50, per_item).rank_depth == 50
    assert make_sampler(1_000, SamplerSpec(num_sampled_classes=30, rank_depth=40)).rank_depth == 40


@pytest.mark.parametrize(
    ("num_classes", "keywords", "columns"),
    [(1_000, {"num_shared_classes": 0}, 30), (1_000, {"num_shared_classes": 70}, 100), (50, {}, 80), (30, {}, 30)],
)
def test_columns_are_the_logits_of_an_item(num_classes, keywords, columns):
    """A shared tail only where there are classes below the ranked ones."""
    sampler = make_sampler(num_classes, SamplerSpec(num_sampled_classes=30, **keywords))
    sample = sampler.sample([TeacherTargets(torch.randn(2, num_classes), 2.0, sampler.rank_depth)])
    assert sampler.columns == sample.log_weights.shape[1] == columns


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_sampled_classes", 0),
        ("num_shared_classes", -1),
        ("rank_depth", 0),
        ("proposal", "disc"),
        ("design", "systematic"),
        ("design", "replacement"),  # with a shared tail
        ("proposal_floor", 0.0),
        ("proposal_floor", 1.5),
        ("proposal_decay", 1.0),
    ],
)
def test_arguments_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name} is '?{value}'?: it has to be"):
        make_sampler(100, SamplerSpec(**{"num_shared_classes": 8, name: value}))


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes is 0"):
        make_sampler(0)
