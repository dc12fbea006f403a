"""Invariants of the package as a whole: imports, allocations, and waiting for the device."""

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
from hf_dis.head import row_gradients, sampled_linear
from hf_dis.sampling import sampler
from hf_dis.teacher.targets import TeacherTargets

PACKAGE = Path(hf_dis.__file__).parent
CLASSES, ITEMS, WIDTH, CHUNK_ITEMS = 20_000, 64, 16, 4

# Folders and files that need torch alone: with them, a loss can be computed where there is no transformers. Triton is
# imported by the kernels only, which are imported where they run.
MATHS = (
    *(
        "arguments.py",
        "autotune.py",
        "checks.py",
        "dis_loss.py",
        "errors.py",
        "items.py",
        "kernels.py",
        "precision.py",
        "sampler_spec.py",
    ),
    *("distributed", "fused", "head", "loss", "sampling"),
    *("models/after_head.py", "models/gathered.py", "models/head_features.py", "models/spread.py", "models/ties.py"),
    *("models/fsdp_units.py", "models/triton_gathered.py"),
    *("report/diagnostics.py", "report/gradient_error.py"),
    *("teacher/cached.py", "teacher/compact.py", "teacher/logit_checks.py"),
    *("teacher/ranking.py", "teacher/targets.py"),
    *("teacher/triton_normaliser.py", "teacher/triton_ranking.py", "teacher/triton_stored.py"),
)
MATHS_FILES = sorted(
    file for path in MATHS for file in [PACKAGE / path, *(PACKAGE / path).glob("*.py")] if file.is_file()
)


def module_name(file):
    return ".".join(["hf_dis", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


@pytest.mark.parametrize("file", MATHS_FILES, ids=module_name)
def test_the_maths_imports_neither_transformers_nor_accelerate(file):
    tree = ast.parse(file.read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported.add(node.module)
    foreign = {
        name for name in imported if name.split(".")[0] not in {"torch", "numpy", "triton", *sys.stdlib_module_names}
    }
    assert foreign <= set(map(module_name, MATHS_FILES))


def test_every_part_of_the_maths_is_there():
    assert [path for path in MATHS if not (PACKAGE / path).exists()] == []
    assert len(MATHS_FILES) > 25


# Memory


class Largest(TorchDispatchMode):
    """The largest tensor created, except tensors of the shape of the head's weight, such as its gradient."""

    def __init__(self):
        super().__init__()
        self.shape = torch.Size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            # A sparse matrix of places in all logits has their shape, and nothing of their size.
            is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if is_dense and tensor.shape not in ((CLASSES, WIDTH), (WIDTH, CLASSES)):
                self.shape = max(self.shape, tensor.shape, key=torch.Size.numel)
        return result


def largest_of_training(make_trainer, monkeypatch, **keywords):
    monkeypatch.setattr("hf_dis.teacher.targets.CHUNK_ELEMENTS", CHUNK_ITEMS * CLASSES)
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
    """The student has no N x C tensor in forward, backward or the optimizer; the teacher has one chunk of it."""
    assert largest_of_training(make_trainer, monkeypatch, **layout) <= CHUNK_ITEMS * CLASSES


def test_exact_distillation_does_exceed_it(make_trainer, monkeypatch):
    """The measurement sees a tensor that is too large."""
    assert largest_of_training(make_trainer, monkeypatch, head_mode="exact") >= ITEMS * CLASSES


def test_one_chunk_of_the_teacher_lives_at_a_time(make_trainer):
    """Logits and ranked targets of a chunk are gone when the next chunk is computed."""
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
# These look into tensors on the processor only.
ON_PROCESSORS = {sampled_linear._item_products, row_gradients._sorted, row_gradients._most_classes}
ON_PROCESSORS |= {sampler._is_known_to_be_finite}
# The one wait of a step, in backward, for the number of rows in the head's gradient.
MAY_WAIT = {row_gradients._on_the_host}
NOT_COUNTED = {function.__name__ for function in ON_PROCESSORS | MAY_WAIT}
COPYING = ("new_tensor",)  # copies Python numbers to the device, and waits for its stream


class CallsFromPackage:
    """Counts calls of tensor methods by a line of hf_dis, not of Trainer or torch."""

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
            if self.counting and ours and caller.f_code.co_name not in NOT_COUNTED:
                self.calls.append(f"{name} in {caller.f_code.co_filename}:{caller.f_lineno}")
            return method(tensor, *args, **kwargs)

        return counted


class SecondStep(TrainerCallback):
    """Counts in the second step only: the first step checks the head, and the last step logs."""

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


# With a row-sparse head a step waits once, for the distinct classes: tests/accelerator counts this wait.
DENSE = {"row_sparse_head": False}
MODES = [DENSE, {**DENSE, "num_shared_classes": 0, "proposal": "teacher"}, {"head_mode": "exact"}]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_between_logs_never_waits_for_the_device(make_trainer, monkeypatch, mode):
    assert calls_of_a_step(make_trainer, monkeypatch, WAITING, **mode) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_looks_into_tensors_is_noticed(make_trainer, monkeypatch, mode):
    """The count sees calls that wait."""
    assert calls_of_a_step(make_trainer, monkeypatch, WAITING, checks_values=True, **mode) != []


def test_a_step_between_logs_copies_no_number_to_the_device(make_trainer, monkeypatch):
    """``new_tensor`` of a number copies from pageable memory and waits for the stream; ``new_full`` does not."""
    assert calls_of_a_step(make_trainer, monkeypatch, COPYING, **DENSE) == []
