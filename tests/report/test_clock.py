"""The clock of a step: parts add up to the step, and steps that are not timed cost nothing."""

import time

import pytest
import torch
from torch import nn

from hf_dis.report.clock import BACKWARD, DATA, OPTIMIZER, PARTS, STUDENT, TEACHER, StepClock


@pytest.fixture
def student(seconds):
    class Student(nn.Linear):
        def forward(self, features):
            seconds(4)
            return super().forward(features)

    return Student(2, 2)


@pytest.fixture
def seconds(monkeypatch):
    """A time that advances by the given seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_by(number):
        now[0] += number

    return pass_by


def run_step(clock, student, seconds, step):
    """A step of two accumulated batches with parts of known lengths."""
    clock.begin(step)
    for _ in range(2):
        seconds(2)
        student(torch.zeros(1, 2))
        seconds(8)
        clock.mark(BACKWARD)
    seconds(16)
    clock.mark(OPTIMIZER)
    seconds(100)  # callbacks
    clock.end()
    clock.rest(step + 1)


def test_parts_of_a_step(student, seconds):
    clock = StepClock(student, torch.device("cpu"))
    run_step(clock, student, seconds, 0)
    assert clock.means() == {}
    seconds(1)
    run_step(clock, student, seconds, 1)
    expected = {DATA: 1, TEACHER: 4, STUDENT: 8, BACKWARD: 16, OPTIMIZER: 16}
    assert clock.means() == expected and tuple(expected) == PARTS
    for step in range(2, 12):
        seconds(3)
        run_step(clock, student, seconds, step)
    assert clock.steps == 2 and clock.means() == expected | {DATA: 2}


def test_the_first_step_of_a_resumed_training_is_not_timed(student, seconds):
    clock = StepClock(student, torch.device("cpu"))
    run_step(clock, student, seconds, 11)
    assert clock.means() == {}


def test_the_student_has_hooks_within_timed_steps_only(student):
    clock = StepClock(student, torch.device("cpu"))
    for step, hooks in ((0, 0), (1, 1), (2, 0)):
        clock.begin(step)
        assert len(student._forward_hooks) == len(student._forward_pre_hooks) == hooks
        clock.end()
        assert not student._forward_hooks and not student._forward_pre_hooks


def test_a_step_that_died_is_closed(student):
    clock = StepClock(student, torch.device("cpu"))
    clock.begin(0)
    clock.end()
    clock.begin(1)
    clock.close()
    assert not student._forward_hooks and clock.steps == 0
