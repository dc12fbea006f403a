"""Compiled, recomputed and in lower precision, a training is the eager one."""

import pytest
import torch
from tiny_models import assert_near, labelled_tokens, llama, vit
from transformers import TrainerCallback

from hf_dis import SamplerSpec

BUILDS = {"image": vit, "causal LM": llama}
CALM = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 4, "num_shared_classes": 8}


def token_data(fixed):
    """Each example with another number of supervised tokens, or all with the same."""
    items = labelled_tokens(32, 40)
    for number, item in enumerate(items):
        item["labels"][: 1 if fixed else number % 5] = -100
    return items


def trained(make_trainer, task, fixed=False, **keywords):
    build = BUILDS[task]
    if task != "image":
        keywords["train_dataset"] = token_data(fixed)
    trainer = make_trainer(build(40), build(40, seed=1, spread=30), **{**CALM, **keywords})
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("task", BUILDS)
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_activation_checkpointing_changes_nothing(make_trainer, task, mode, use_reentrant):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    plain = trained(make_trainer, task, head_mode=mode)
    assert_near(trained(make_trainer, task, head_mode=mode, **checkpointing), plain, 1e-7)


@pytest.mark.parametrize("task", BUILDS)
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_bfloat16_is_float32_within_its_precision(make_trainer, task, mode):
    settings = {"head_mode": mode, "proposal": "topk", "num_shared_classes": 0, "num_sampled_classes": 10}
    plain, low = (trained(make_trainer, task, bf16=flag, **settings) for flag in (False, True))
    assert all(value.dtype == torch.float32 for value in low.values())
    assert_near(low, plain, 0.02)


def test_a_step_that_overflows_is_skipped_and_scaled_down():
    """The effect of ``fp16=True`` on an accelerator: unscaled gradients are the plain ones, and Inf skips the step."""
    from hf_dis import DISLoss, make_sampler

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40)
    features, teacher = torch.randn(6, 8), torch.randn(6, 40)

    def loss():
        return DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=6)))(features, head.weight, head.bias, teacher)

    loss().backward()
    plain = head.weight.grad.clone()
    optimizer, scaler = torch.optim.SGD(head.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(head.weight.grad, plain)
    before = head.weight.detach().clone()
    head.weight.grad[3] = torch.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    (scaler.scale(loss()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.weight, before) and scaler.get_scale() == 2.0**9


class Graphs(TrainerCallback):
    """The number of graphs that dynamo has compiled after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("task", BUILDS)
def test_a_compiled_student_is_the_eager_one_with_few_graphs(make_trainer, task, backend):
    """Batches with different numbers of supervised tokens: at first a graph for each, then one for all numbers."""
    eager = trained(make_trainer, task, max_steps=8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = Graphs()
    compiled = {"torch_compile": True, "torch_compile_backend": backend, "callbacks": [graphs]}
    assert_near(trained(make_trainer, task, max_steps=8, **compiled), eager, 1e-5)
    assert graphs.counts[-1] > 0, "nothing was compiled"
    assert graphs.counts[-1] == graphs.counts[3], graphs.counts  # nothing new in the second half
    assert graphs.counts[-1] <= 6, graphs.counts
