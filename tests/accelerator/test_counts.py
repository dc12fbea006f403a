"""Launches, waits and memory of a step on an accelerator, counted on fake CUDA tensors."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerator_counts import KERNELS, SHAPES, TARGETS_KINDS, count
from fake_cuda import fake_cuda

from hf_dis import DISLoss, make_sampler
from hf_dis.loss.exact_head import exact_head_loss
from hf_dis.loss.f_divergence import JensenShannon
from hf_dis.sampling import sampler as sampling

# Launches of a step, with torch alone and with Triton's kernels: a change that needs more has to say so here.
LAUNCHES = {
    ("lm", "given"): (280, 50),
    ("lm", "cached"): (276, 63),
    ("lm", "online"): (406, 81),
    ("classifier", "given"): (313, 54),
    ("classifier", "cached"): (309, 65),
    ("classifier", "online"): (423, 83),
}
# Gigabytes beyond inputs, weights and the gradient of W, with Triton's kernels, and gigabytes moved before the
# optimizer's step.
GIGABYTES = {
    ("lm", "given"): (0.25, 6.0),
    ("lm", "cached"): (0.25, 5.8),
    ("lm", "online"): (0.6, 14.0),
    ("classifier", "given"): (0.15, 3.2),
    ("classifier", "cached"): (0.05, 0.7),
    ("classifier", "online"): (0.5, 10.5),
}
# Of a step on all classes with Triton's kernels: launches, gigabytes beyond the gradient of W, and gigabytes moved.
EXACT = {
    ("lm", "given"): (75, 1.1, 56),
    ("lm", "cached"): (85, 1.2, 52),
    ("lm", "online"): (95, 1.5, 63),
    ("classifier", "given"): (70, 1.35, 68),
    ("classifier", "cached"): (80, 1.35, 64),
    ("classifier", "online"): (110, 1.6, 78),
}
# Gigabytes beyond inputs, weights and the gradient of W, with torch alone.
PLAIN_PEAK = {
    ("lm", "given"): 0.4,
    ("lm", "cached"): 0.4,
    ("lm", "online"): 0.6,
    ("classifier", "given"): 0.3,
    ("classifier", "cached"): 0.05,
    ("classifier", "online"): 0.5,
}
WAITS = 1  # for the number of distinct classes


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("targets", TARGETS_KINDS)
def test_launches_and_waits(shape, targets, kernels):
    record = count(SHAPES[shape], targets, kernels=kernels)
    assert record["launches"] <= LAUNCHES[shape, targets][KERNELS.index(kernels)]
    assert record["waits"] <= WAITS
    if kernels == "triton":
        peak, moved = GIGABYTES[shape, targets]
        assert record["peak_gb"] <= peak and record["moved_gb"] <= moved
    else:
        assert record["peak_gb"] <= PLAIN_PEAK[shape, targets]


@pytest.mark.parametrize("targets", TARGETS_KINDS)
def test_launches_do_not_grow_with_items_and_classes(targets):
    shape = SHAPES["lm"]
    larger = replace(shape, num_items=2 * shape.num_items, num_classes=2 * shape.num_classes)
    assert count(larger, targets)["launches"] <= count(shape, targets)["launches"]


def test_a_dense_head_launches_no_more():
    shape = SHAPES["lm"]
    assert count(shape, "given", row_sparse=False)["launches"] <= count(shape, "given")["launches"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exact_step_holds_blocks_only(shape):
    """Of a language model at most 1.5 GB beyond the gradient of W; one wait, as the loss is a mean."""
    shape = SHAPES[shape]
    record = count(shape, "given", mode="exact")
    assert 0.5 < record["peak_gb"] < (1.5 if shape.is_lm else 2.1)
    assert record["launches"] <= 3900 and record["waits"] <= 1


@pytest.mark.parametrize(("shape", "targets"), EXACT)
def test_an_exact_step_by_kernels(shape, targets):
    """Six launches per block of logits; a wait where the loss is not a sum."""
    launches, peak, moved = EXACT[shape, targets]
    record = count(SHAPES[shape], targets, kernels="triton", mode="exact")
    assert record["launches"] <= launches and record["waits"] <= 1
    assert record["peak_gb"] <= peak and record["moved_gb"] <= moved


def test_the_kernels_of_an_exact_step_do_not_depend_on_the_divergence():
    """Beyond one more per block: the mean of the slope."""
    with mock.patch("accelerator_counts.exact_head_loss", with_divergence(JensenShannon())):
        launches = count(SHAPES["lm"], "given", kernels="triton", mode="exact")["launches"]
    assert launches == count(SHAPES["lm"], "given", kernels="triton", mode="exact")["launches"] + 8


def with_divergence(divergence):
    return lambda *args: exact_head_loss(*args, divergence=divergence)


def test_a_gradient_that_nothing_else_holds_is_not_copied():
    with fake_cuda() as counts:
        weight = torch.empty(2**20, device="cuda", requires_grad=True)
        for holds, copies in ((False, 0), (True, 1)):
            held = []
            weight.grad = None
            weight_loss = Doubled.apply(weight, held if holds else None)
            counts.start()
            weight_loss.sum().backward()
            assert counts.peak() // weight.nbytes == 1 + copies


def test_rows_that_one_of_two_kernels_reads_are_counted_once():
    """Each of the further vectors is one contribution to a gradient: of a piece, or beside the pieces."""
    triton_rows = pytest.importorskip("hf_dis.head.triton_rows")
    moved = []
    with fake_cuda() as counts:
        vectors, scales = torch.empty(8, 16, device="cuda"), torch.empty(200, device="cuda")
        which, starts = (torch.empty(number, dtype=torch.long, device="cuda") for number in (200, 11))
        others = torch.empty(64, 16, device="cuda")
        for more in (None, others):
            counts.start()
            triton_rows.segment_rows(vectors, which, scales, starts, torch.float32, others=more)
            moved.append(sum(counts.moved.values()))
    assert moved[1] - moved[0] == others.nbytes


def test_norms_of_several_gradients_are_one_launch():
    with fake_cuda() as counts:
        gradients = [torch.empty(size, device="cuda") for size in (8, 16, 32)]
        counts.start()
        torch.nn.utils.get_total_norm(gradients)
        assert [key[1] for key in counts.moved] == ["_foreach_norm", "stack", "linalg_vector_norm"]


class Doubled(torch.autograd.Function):
    """Two times a tensor, whose gradient may be held elsewhere."""

    @staticmethod
    def forward(ctx, values, held):
        ctx.held = held
        return 2 * values

    @staticmethod
    def backward(ctx, grad):
        gradient = 2 * grad
        if ctx.held is not None:
            ctx.held.append(gradient)
        return gradient, None


# What the counts find


def step(change, num_items=64, num_classes=5000):
    """The counts of a forward of DISLoss in which the sampling of the ranks does something more."""
    own = sampling.sample_all_ranks
    with fake_cuda() as counts:
        sampler = make_sampler(num_classes, device="cuda")
        dis_loss = DISLoss(sampler)
        dis_loss._has_checked_values = True
        features = torch.empty(num_items, 8, device="cuda", requires_grad=True)
        weight = torch.empty(num_classes, 8, device="cuda", requires_grad=True)
        logits = torch.empty(num_items, num_classes, device="cuda")

        def changed(answers, *others):
            change(answers)
            return own(answers, *others)

        with mock.patch.object(sampling, "sample_all_ranks", changed):
            counts.start()
            dis_loss(features, weight, None, logits)
        return sum(counts.launches.values()), sum(counts.waits.values())


def test_a_tensor_on_the_processor_is_refused():
    with pytest.raises(RuntimeError, match="cpu"):
        step(lambda answers: answers.log_probs + torch.ones(len(answers.ids), 1))


def test_a_look_at_a_value_is_a_wait():
    assert step(lambda answers: answers.log_probs.sum().item())[1] == step(lambda answers: None)[1] + 1


def test_a_pageable_copy_is_a_wait():
    assert step(lambda answers: torch.empty(2**15).to("cuda"))[1] == step(lambda answers: None)[1] + 1


def test_a_loop_over_items_is_counted():
    launches = step(lambda answers: [item.exp() for item in answers.log_probs])[0]
    assert launches == step(lambda answers: None)[0] + 64
