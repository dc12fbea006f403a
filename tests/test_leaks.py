"""A training leaves no patch, hook, memory, thread or process behind, however the training ends."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import interrupt_worker
import pytest
import torch
from tiny_models import labelled_images, patched_modules, vit
from transformers import TrainerCallback

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MARKS = {"_is_accelerate_prepared", "model_tags"}  # of Trainer, and for the model card


def left_on(model):
    """Modules whose forward is not their class's, hooks, and attributes that a new ViT does not have."""
    hooks = [(name, kind) for name, module in model.named_modules() for kind in HOOKS if getattr(module, kind)]
    new = {name: vars(module).keys() for name, module in vit(40).named_modules()}
    added = [(name, vars(module).keys() - new[name] - MARKS) for name, module in model.named_modules()]
    return patched_modules(model), hooks, [(name, names) for name, names in added if names]


NOTHING = ([], [], [])


class Stops(TrainerCallback):
    """Raises at the end of the second step."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


def raising(error, after=3):
    """A hook that raises when it is called for the n-th time."""
    calls = []

    def hook(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise error

    return hook


def in_a_callback(make_trainer, error, **keywords):
    return make_trainer(callbacks=[Stops(error)], **keywords), lambda: None


def in_the_students_forward(make_trainer, error, **keywords):
    trainer = make_trainer(**keywords)
    return trainer, trainer.model.vit.layernorm.register_forward_hook(raising(error, after=3)).remove


def in_the_teachers_forward(make_trainer, error, **keywords):
    trainer = make_trainer(**keywords)
    return trainer, trainer.distiller.teacher.model.vit.register_forward_hook(raising(error)).remove


def in_the_backward_pass(make_trainer, error, **keywords):
    trainer = make_trainer(**keywords)
    return trainer, trainer.model.classifier.bias.register_hook(raising(error, after=2)).remove


PLACES = [in_a_callback, in_the_students_forward, in_the_teachers_forward, in_the_backward_pass]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_an_interrupted_training_leaves_two_ordinary_models(make_trainer, place, error, mode):
    trainer, remove = place(make_trainer, error, head_mode=mode, probe_steps=1 if mode == "sampled" else 0)
    with pytest.raises(type(error)):
        trainer.train()
    remove()
    assert left_on(trainer.model) == left_on(trainer.distiller.teacher.model) == NOTHING
    images = torch.stack([item["pixel_values"] for item in labelled_images(4, 40)])
    assert trainer.model.eval()(images).logits.shape == (4, 40)
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, Stops)]
    trainer.train()  # and it can be trained again
    assert left_on(trainer.model) == NOTHING


@pytest.mark.parametrize("keywords", [{}, {"head_mode": "exact"}, {"num_shared_classes": 0, "row_sparse_head": True}])
def test_a_training_leaves_two_ordinary_models(make_trainer, keywords):
    trainer = make_trainer(eval_dataset=labelled_images(8, 40), eval_strategy="steps", eval_steps=2, **keywords)
    trainer.train()
    assert left_on(trainer.model) == left_on(trainer.distiller.teacher.model) == NOTHING


# Two trainers


class Nests(TrainerCallback):
    """Trains another trainer to its end between two steps."""

    def __init__(self, other):
        self.other = other

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.other.train()


def test_two_trainers_in_one_process_do_not_disturb_each_other(make_trainer, tmp_path):
    """They share one teacher; one samples with a shared tail, and one item by item."""
    teacher = vit(40, seed=1, spread=30)
    layouts = {"one": {}, "other": {"num_shared_classes": 0, "temperature": 3.0}}

    def trainers(folder):
        return [
            make_trainer(vit(40, seed), teacher, output_dir=str(tmp_path / folder / name), **layout)
            for seed, (name, layout) in enumerate(layouts.items())
        ]

    alone = trainers("alone")
    for trainer in alone:
        trainer.train()
    one, other = trainers("together")
    one.add_callback(Nests(other))
    one.train()
    for together, reference in zip((one, other), alone, strict=True):
        assert together.state.global_step == 4
        found, expected = (
            {**one.model.state_dict(), **one.distiller.sampler.state_dict()} for one in (together, reference)
        )
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# Memory


class Watches(TrainerCallback):
    """Counts live tensors, all live objects and resident bytes at some steps."""

    def __init__(self, steps):
        self.steps, self.tensors, self.objects, self.resident = steps, [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            gc.collect()
            things = gc.get_objects()
            self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in things))
            self.objects.append(len(things))
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("steps", "layout"),
    [
        pytest.param(2_000, {}, marks=pytest.mark.slow, id="2,000 steps"),
        pytest.param(2_000, {"num_shared_classes": 0}, marks=pytest.mark.slow, id="2,000 steps per item"),
        pytest.param(200, {"probe_steps": 5}, id="200 steps"),
    ],
)
def test_memory_is_flat(make_trainer, steps, layout):
    """Compares half of the steps, when caches and allocators are full, with the end."""
    watch = Watches({steps // 2, steps})
    make_trainer(max_steps=steps, logging_steps=steps // 4, callbacks=[watch], **layout).train()
    assert watch.tensors[1] <= watch.tensors[0]
    assert watch.objects[1] - watch.objects[0] < 100  # less than one object in two steps; two logs are kept
    assert watch.resident[1] - watch.resident[0] < 8 * 2**20


# Threads and processes


def test_threads_and_workers_end_with_the_training(make_trainer):
    threads = set(threading.enumerate())
    make_trainer(dataloader_num_workers=2).train()
    gc.collect()
    assert multiprocessing.active_children() == []
    assert set(threading.enumerate()) <= threads


def _interrupt(process):
    """Sends Ctrl-C until the process ends: Python drops an interrupt that arrives while a destructor runs."""
    for _ in range(4):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=30)[0]
    process.kill()
    pytest.fail("the training goes on after Ctrl-C")


@pytest.mark.slow
@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN], ids=["as in a shell", "in the background"])
def test_ctrl_c_ends_the_training_and_all_its_processes(tmp_path, inherited):
    process = subprocess.Popen(
        [sys.executable, interrupt_worker.__file__, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the workers are in its group, as in a shell
        preexec_fn=lambda: signal.signal(signal.SIGINT, inherited),
    )
    lines = iter(process.stdout.readline, "")
    assert next(line for line in lines if line.startswith("training")) == "training 2\n"
    told = _interrupt(process)
    assert process.returncode == 0
    assert "patched []" in told
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the training is still there")
