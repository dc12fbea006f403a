"""Checks of a teacher's logits."""

import pytest
import torch

from hf_dis.teacher.logit_checks import check_support, check_teacher_logits


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float16).min])
def test_masked_classes_are_named(masked):
    logits = torch.randn(4, 5).half()
    check_support(logits)
    logits[2, 1] = masked
    with pytest.raises(ValueError, match=r"items \[12\]"):
        check_support(logits, first_item=10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(value):
    logits = torch.randn(4, 5)
    logits[0] = torch.finfo(torch.float32).max  # whose sum overflows
    logits[1, :4] = -torch.inf
    check_teacher_logits(logits, 5)
    logits[3, 2] = value
    check_teacher_logits(logits, 5, check_finite=False)
    with pytest.raises(FloatingPointError, match=r"items \[13\]"):
        check_teacher_logits(logits, 5, first_item=10)


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match="logits of 5 classes, the student of 6"):
        check_teacher_logits(torch.zeros(1, 5), 6)
