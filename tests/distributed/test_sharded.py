"""FSDP2 over two real processes (gloo, CPU): the switched head of a sharded student, the teacher whole on each."""

import pytest
import sharded_worker as worker
import torch
from launch import two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("unit", worker.UNITS)
@pytest.mark.parametrize("name", worker.MODELS)
def test_a_sharded_student_gets_the_gradient_of_a_whole_one(ranks, name, unit):
    for rank in ranks:
        found, expected = rank[name, unit], rank[name, "whole"]
        assert rank[name, unit, "sharded"] and rank[name, unit, "patched"] == []
        assert found.keys() == expected.keys()
        size = max(float(gradient.abs().max()) for gradient in expected.values())
        assert size > 1e-3
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-5 * size, msg=parameter)
