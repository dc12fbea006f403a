"""Invariants of the package as a whole: what is imported, what is allocated, what waits for the device."""

import ast
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import labelled_images, vit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import hf_dis
from hf_dis.teacher.targets import TeacherTargets

PACKAGE = Path(hf_dis.__file__).parent
CLASSES, ITEMS, WIDTH, CHUNK_ROWS = 20_000, 64, 16, 4


MATHS = [
    "checks",
    "sampling",
    "sampler",
    "proposal",
    "losses",
    "heads",
    "sparse",
    "optim",
    "targets",
    "items",
    "diagnostics",
    "sampled",
]


@pytest.mark.parametrize("module", MATHS)
def test_the_maths_imports_neither_transformers_nor_accelerate(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    foreign = {name for name in imported if name.split(".")[0] not in {"torch", "numpy", *sys.stdlib_module_names}}
    assert foreign <= {f".{name}" for name in MATHS}


# Memory


class Largest(TorchDispatchMode):
    """The largest tensor created, but for those of the head's own shapes: its weight's and bias's gradient."""

    def __init__(self):
        super().__init__()
        self.shape = torch.Size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            # Places of a sparse product have the shape of all logits, and nothing of their size.
            is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if is_dense and tensor.shape not in ((CLASSES, WIDTH), (WIDTH, CLASSES)):
                self.shape = max(self.shape, tensor.shape, key=torch.Size.numel)
        return result


def largest_of_training(make_trainer, monkeypatch, **keywords):
    monkeypatch.setattr("hf_dis.teacher.stream.CHUNK_ELEMENTS", CHUNK_ROWS * CLASSES)
    trainer = make_trainer(
        vit(CLASSES),
        vit(CLASSES, seed=1, spread=30),
        train_dataset=labelled_images(ITEMS, CLASSES),
        per_device_train_batch_size=ITEMS,
        max_steps=2,
        **keywords,
    )
    with Largest() as largest:
        trainer.train()
    return largest.shape.numel()


LAYOUTS = [
    {"num_shared_classes": 64},
    {"num_shared_classes": 0},
    {"num_shared_classes": 0, "design": "replacement"},
    {"num_shared_classes": 64, "proposal": "teacher"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_of_a_training_step_exceeds_a_chunk_of_the_teacher(make_trainer, monkeypatch, layout):
    """No N x C of the student, in forward, backward or the optimizer; of the teacher never more than a chunk."""
    assert largest_of_training(make_trainer, monkeypatch, **layout) <= CHUNK_ROWS * CLASSES


def test_exact_distillation_does_exceed_it(make_trainer, monkeypatch):
    """That the measurement sees what it is for."""
    assert largest_of_training(make_trainer, monkeypatch, head_mode="exact") >= ITEMS * CLASSES


def test_one_chunk_of_the_teacher_lives_at_a_time(make_trainer):
    """Logits and ranked targets of the chunk before are gone when the next is asked for."""
    trainer = make_trainer(train_dataset=labelled_images(8, 40), max_steps=1)
    trainer.distiller.teacher.stream.chunk_items = 2
    head = trainer.distiller.teacher.model.classifier
    logits, alive = [], []
    answer = head.forward

    def forward(features):
        ranked = sum(isinstance(thing, TeacherTargets) for thing in gc.get_objects())
        alive.append(ranked + sum(reference() is not None for reference in logits))
        output = answer(features)
        logits.append(weakref.ref(output))
        return output

    head.forward = forward
    trainer.train()
    assert alive[2:] == [0, 0, 0, 0]  # the first two compare the split teacher with the whole one


# Waiting for the device

WAITING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
ON_PROCESSORS = ("_row_products", "_sorted")  # what these look into, they do where there is nothing to wait for
COPYING = ("new_tensor",)  # from Python numbers: a copy to the device, and the stream is waited for


class CallsFromPackage:
    """Counts calls of tensor methods that were made by a line of hf_dis, not by Trainer's or torch's."""

    def __init__(self, monkeypatch, names):
        self.calls, self.counting = [], False
        for name in names:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, method):
        def counted(tensor, *args, **kwargs):
            caller = sys._getframe(1)
            while "torch" in Path(caller.f_code.co_filename).parts:
                caller = caller.f_back
            ours = Path(caller.f_code.co_filename).is_relative_to(PACKAGE)
            if self.counting and ours and caller.f_code.co_name not in ON_PROCESSORS:
                self.calls.append(f"{name} in {caller.f_code.co_filename}:{caller.f_lineno}")
            return method(tensor, *args, **kwargs)

        return counted


class SecondStep(TrainerCallback):
    """The first step checks the head, and the last one logs."""

    def __init__(self, calls):
        self.calls = calls

    def on_step_begin(self, args, state, control, **kwargs):
        self.calls.counting = state.global_step == 1

    def on_step_end(self, args, state, control, **kwargs):
        self.calls.counting = False


def calls_of_a_step(make_trainer, monkeypatch, names, checks_values=False, **keywords):
    calls = CallsFromPackage(monkeypatch, names)
    trainer = make_trainer(max_steps=3, logging_steps=3, callbacks=[SecondStep(calls)], **keywords)
    monkeypatch.setattr(trainer, "_checks_values", lambda: checks_values)  # False on an accelerator, between logs
    trainer.train()
    return calls.calls


MODES = [{}, {"num_shared_classes": 0, "proposal": "teacher"}, {"head_mode": "exact"}]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_between_logs_never_waits_for_the_device(make_trainer, monkeypatch, mode):
    assert calls_of_a_step(make_trainer, monkeypatch, WAITING, **mode) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_looks_into_tensors_is_noticed(make_trainer, monkeypatch, mode):
    """That the count sees what it is for."""
    assert calls_of_a_step(make_trainer, monkeypatch, WAITING, checks_values=True, **mode) != []


def test_a_step_between_logs_copies_no_number_to_the_device(make_trainer, monkeypatch):
    """``new_tensor`` of a number copies from pageable memory and waits for the stream; ``new_full`` does not."""
    assert calls_of_a_step(make_trainer, monkeypatch, COPYING) == []
