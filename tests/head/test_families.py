"""The heads of every family: sampled classes computed as the full head does, and the table that lists them."""

import re
from pathlib import Path

import pytest
import torch
from head_cases import LENGTH, POSITIONS, REFUSED, SAMPLED, TAIL_IDS, TAILS, C, N, gradients, sampled_ids
from tiny_models import gpt2_sequences, llama_sequences, patched_modules, tails_of_items, tokens

from hf_dis.head.check import check_head
from hf_dis.head.switch import SampledHead
from hf_dis.models.head_search import find_head_layers
from hf_dis.models.ties import find_tied_embeddings

TABLE = Path(__file__).parents[2] / "docs" / "heads.md"


def full_and_sampled(model, head, inputs, positions, item_ids, tail_ids):
    """Logits at the sampled classes and gradients, of the full head and of the switched one, with the same dropout."""
    torch.manual_seed(2)
    full = model(**inputs).logits
    full = full if positions is None else full.flatten(0, 1)[positions]
    full = full.gather(1, torch.cat([item_ids, tails_of_items(tail_ids, len(item_ids))], 1))
    expected = gradients(model, full)
    torch.manual_seed(2)
    with head.only(item_ids, tail_ids, positions):
        sampled = model(**inputs).logits
        found = gradients(model, sampled)
    return full, expected, sampled, found


@pytest.mark.parametrize(
    "tail_ids", [TAIL_IDS, TAILS, TAIL_IDS[:, :0]], ids=["two strata", "several tails", "per item"]
)
@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_classes_are_computed_as_by_the_full_head(case, tail_ids):
    """Logits and every gradient of the model, in training mode, float64 to 1e-10 of the whole gradient's norm."""
    model, head, inputs, positions = SAMPLED[case].prepared()
    item_ids = sampled_ids(N if positions is None else len(positions))
    full, expected, sampled, found = full_and_sampled(model, head, inputs, positions, item_ids, tail_ids)
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-10)
    assert full.std() > 0.01 and found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[name] - expected[name]).norm() <= 1e-10 * whole for name in expected)


@pytest.mark.parametrize("case", SAMPLED)
def test_row_sparse_gradients_are_those_of_the_full_head_in_the_rows_in_use(case):
    model, head, inputs, positions = SAMPLED[case].prepared()
    item_ids = sampled_ids(N if positions is None else len(positions))
    embeddings = find_tied_embeddings(model, head.layers)
    sparse = SampledHead(model, list(head.layers), row_sparse=True, embeddings=embeddings)
    _, expected, _, found = full_and_sampled(model, sparse, inputs, positions, item_ids, TAIL_IDS)
    in_head = {id(parameter) for parameter in head.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in in_head}
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in found.items():
        assert gradient.is_sparse == (name in names)
        assert ((gradient.to_dense() if gradient.is_sparse else gradient) - expected[name]).norm() <= 1e-10 * whole


@pytest.mark.parametrize("case", SAMPLED)
def test_each_passes_its_check_and_is_left_as_it_was(case):
    model, head, inputs, positions = SAMPLED[case].prepared()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check_head(model, head, inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and patched_modules(model) == []
    with head.only(sampled_ids(N if positions is None else len(positions)), TAIL_IDS, positions):
        model(**inputs)
        assert list(model.state_dict()) == list(state) and len(patched_modules(model)) == len(head.layers)
    assert patched_modules(model) == [] and not any("final_logits_bias" in vars(module) for module in model.modules())
    model.eval()
    assert model(**inputs).logits.shape[-1] == C


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [gpt2_sequences, llama_sequences])
def test_a_head_before_the_pooling_answers_at_the_last_token_of_each_sequence(build, side):
    """Token 0 is the padding: sequences of 6, 3 and 1 tokens."""
    model = build(C, spread=10).double()
    ids = tokens(N, 50, LENGTH)["input_ids"].clamp_min(3)
    mask = torch.tensor([[1] * LENGTH, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    head = SampledHead(model, find_head_layers(model, C))
    full, expected, sampled, found = full_and_sampled(model, head, inputs, None, sampled_ids(N), TAILS)
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-10)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", [name for name, case in SAMPLED.items() if case.has_token_items])
def test_a_batch_without_a_supervised_token_has_a_gradient_of_zero_everywhere(case):
    model, head, inputs, _ = SAMPLED[case].prepared()
    with head.only(sampled_ids(0), TAIL_IDS, POSITIONS[:0]):
        logits = model(**inputs).logits
        logits.sum().backward()
    assert logits.shape == (0, 9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if not parameter.requires_grad else not parameter.grad.any(), name


# The table


def test_every_row_of_the_table_is_proved_here_and_every_case_is_in_it():
    rows = re.findall(r"^\| `([^|]*)` \|", TABLE.read_text(), re.MULTILINE)
    named = [name for row in rows for name in row.split("`, `")]
    assert sorted(named) == sorted([*SAMPLED, *REFUSED])
