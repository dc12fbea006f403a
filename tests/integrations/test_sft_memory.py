"""No logits of all tokens and all classes exist at a time, where batches are padding-free neither."""

import chats
import pytest
import torch
from tiny_models import llama
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES, WIDTH, CHUNK_ITEMS = 4000, 16, 4
LONGEST = 32


class Largest(TorchDispatchMode):
    """The most elements of a dense tensor, except those of the shape of the head's weight."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if is_dense and tensor.shape not in ((CLASSES, WIDTH), (WIDTH, CLASSES)):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("packing", [False, True])
def test_training_and_evaluation(tmp_path, monkeypatch, packing):
    monkeypatch.setattr("hf_dis.teacher.targets.CHUNK_ELEMENTS", CHUNK_ITEMS * CLASSES)
    trainer = chats.make_trainer(
        tmp_path,
        llama(CLASSES),
        llama(CLASSES, seed=1, spread=30),
        train_dataset=chats.chats(30),
        eval_dataset=chats.chats(16),
        packing=packing,
        max_length=LONGEST,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        max_steps=1,
    )
    tokens = next(iter(trainer.get_train_dataloader()))["input_ids"].numel()
    with Largest() as largest:
        trainer.train()
        trainer.evaluate()
    # The first step compares two forwards on two examples.
    assert largest.elements <= 2 * LONGEST * CLASSES < tokens * CLASSES / 4
