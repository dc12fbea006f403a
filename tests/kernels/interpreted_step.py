"""Steps of DISLoss and RowSparseAdamW by the kernels, run in Triton's interpreter: those of plain torch."""

import pytest
import torch

from hf_dis import DISLoss, RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.kernels import VARIABLE

N, C, D = 6, 40, 5
LAYOUTS = {
    "shared": SamplerSpec(num_sampled_classes=4, num_shared_classes=8, num_tails=2, rank_depth=8),
    "some update": SamplerSpec(num_sampled_classes=4, num_shared_classes=8, rank_depth=8, num_updated_classes=2),
    "per item": SamplerSpec(num_sampled_classes=6, num_shared_classes=0),
}


def trained(layout: str, labelled: bool) -> tuple[torch.Tensor, ...]:
    """The losses, gradients on the features and weight and bias of three steps."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(C, D)), torch.nn.Parameter(torch.randn(C))
    dis_loss = DISLoss(make_sampler(C, LAYOUTS[layout]), 2.0, 0.3, row_sparse_head=True)
    optimizer, losses, gradients = RowSparseAdamW([weight, bias], lr=0.1), [], []
    for _ in range(3):
        features, logits = torch.randn(N, D, requires_grad=True), 3 * torch.randn(N, C)
        loss = dis_loss(features, weight, bias, logits, torch.randint(C, (N,)) if labelled else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        gradients.append(features.grad)
    return torch.stack(losses), torch.stack(gradients), weight.detach(), bias.detach()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_by_the_kernels_is_that_of_plain_torch(layout, labelled, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    expected = trained(layout, labelled)
    monkeypatch.setenv(VARIABLE, "triton")
    for found, wanted in zip(trained(layout, labelled), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
