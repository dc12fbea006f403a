"""Steps by the kernels, run in Triton's interpreter: those of plain torch, and compiled once for all batches."""

from collections import defaultdict
from itertools import product

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from hf_dis import DISLoss, RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.kernels import VARIABLE
from hf_dis.loss.exact_head import exact_head_loss

N, C, D = 6, 40, 5
LAYOUTS = {
    "shared": SamplerSpec(num_sampled_classes=4, num_shared_classes=8, num_tails=2, rank_depth=8),
    "some update": SamplerSpec(num_sampled_classes=4, num_shared_classes=8, rank_depth=8, num_updated_classes=2),
    "per item": SamplerSpec(num_sampled_classes=6, num_shared_classes=0),
}
CASES = [(True, True), (True, False), (False, True)]


def trained(layout: str, labelled: bool, has_bias: bool) -> tuple[torch.Tensor, ...]:
    """The losses, gradients on the features and weight and bias of three steps."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(C, D)), torch.nn.Parameter(torch.randn(C)) if has_bias else None
    dis_loss = DISLoss(make_sampler(C, LAYOUTS[layout]), 2.0, 0.3, row_sparse_head=True)
    parameters = [weight, bias] if has_bias else [weight]
    optimizer, losses, gradients = RowSparseAdamW(parameters, lr=0.1), [], []
    for _ in range(3):
        features, logits = torch.randn(N, D, requires_grad=True), 3 * torch.randn(N, C)
        loss = dis_loss(features, weight, bias, logits, torch.randint(C, (N,)) if labelled else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        gradients.append(features.grad)
    return torch.stack(losses), torch.stack(gradients), *(parameter.detach() for parameter in parameters)


# A head without a bias takes another kernel where the batch is labelled; the interpreter is slow.
STEPS = [(layout, *case) for layout, case in product(LAYOUTS, CASES) if layout != "per item" or case != (True, True)]


@pytest.mark.parametrize(("layout", "labelled", "has_bias"), STEPS)
def test_a_step_by_the_kernels_is_that_of_plain_torch(layout, labelled, has_bias, monkeypatch):
    """A labelled step without a bias takes one kernel for logits, loss and the gradient on the features."""
    monkeypatch.setenv(VARIABLE, "torch")
    expected = trained(layout, labelled, has_bias)
    monkeypatch.setenv(VARIABLE, "triton")
    for found, wanted in zip(trained(layout, labelled, has_bias), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def compiled(monkeypatch):
    """Collects the constants of each kernel, and the types of its arguments: a kernel is compiled for both."""
    found, own = defaultdict(set), InterpretedFunction.run

    def run(kernel, *args, grid, warmup, **constants):
        kinds = tuple(one.dtype if isinstance(one, torch.Tensor) else type(one) for one in args)
        found[kernel.fn.__name__].add((kinds, tuple(sorted(constants.items()))))
        return own(kernel, *args, grid=grid, warmup=warmup, **constants)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


@pytest.mark.parametrize(("labelled", "has_bias"), CASES[1:])
@pytest.mark.parametrize("layout", [*LAYOUTS, "exact"])
def test_a_batch_with_another_number_of_items_compiles_no_kernel(layout, labelled, has_bias, monkeypatch, compiled):
    monkeypatch.setenv(VARIABLE, "triton")
    weight, bias = torch.nn.Parameter(torch.randn(C, D)), torch.nn.Parameter(torch.randn(C)) if has_bias else None
    parameters = [weight, bias] if has_bias else [weight]
    first = None
    if layout != "exact":
        dis_loss = DISLoss(make_sampler(C, LAYOUTS[layout]), 2.0, 0.3, row_sparse_head=True)
        optimizer = RowSparseAdamW(parameters, lr=0.1)
    for number in (8, 2, 19):
        features, logits = torch.randn(number, D, requires_grad=True), torch.randn(number, C)
        labels = torch.randint(C, (number,)) if labelled else None
        if layout == "exact":
            loss = exact_head_loss(features, weight, bias, lambda logits=logits: [logits], labels, 2.0, 0.3)[0].sum()
        else:
            loss = dis_loss(features, weight, bias, logits, labels)
        loss.backward()
        if layout != "exact":
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        first = first or {name: set(variants) for name, variants in compiled.items()}
    assert compiled == first and len(first) > 1
