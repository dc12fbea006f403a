"""Tied weights whose modules FSDP2 shards apart, as transformers shards tied models."""

import pytest
from fake_processes import one_of_four
from tiny_models import llama
from torch.distributed.fsdp import fully_shard

from hf_dis.models.ties import check_tied_rows


@pytest.fixture(scope="module", autouse=True)
def second_of_four():
    with one_of_four(rank=1):
        yield


def sharded(num_tokens, is_apart=True):
    model = llama(num_tokens, tie_word_embeddings=True)
    if is_apart:
        fully_shard(model.model.embed_tokens)
    fully_shard(model)
    if is_apart:  # FSDP2 has left the head its own copy
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_rows_that_fsdp2_pads_in_two_units():
    with pytest.raises(ValueError, match=r"lm_head.weight are tied.*41 rows have to be a multiple of 4.*fsdp_size"):
        check_tied_rows(sharded(41))


@pytest.mark.parametrize("model", [lambda: sharded(44), lambda: sharded(41, is_apart=False), lambda: llama(41)])
def test_weights_that_share_their_steps(model):
    check_tied_rows(model())
