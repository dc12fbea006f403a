"""Students that FSDP2 shards, with a sharded head that FSDP leaves alone (gloo): no row of the head is gathered."""

import fsdp_heads_worker as worker
import pytest
from launch import two_processes
from tiny_models import assert_near

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("task", worker.TASKS)
def test_a_student_trains_as_a_whole_one(ranks, task, mode):
    for rank in ranks:
        found, expected = rank[task, mode]
        assert_near(found, expected, 1e-10)
        assert max(float(expected[name].abs().max()) for name in ("classifier.weight", "classifier.bias")) > 1e-3


def test_bytes_that_a_step_sends(ranks):
    for rank in ranks:
        few, many = rank["bytes"][True]
        assert 0 < few == many
        # FSDP gathers weight and bias in float64, its share on each process, and scatters the sums of their gradients.
        few, many = rank["bytes"][False]
        added = (worker.SIZES[1] - worker.SIZES[0]) * (16 + 1) * 8
        assert added <= many - few <= 2 * added
        assert many > rank["bytes"][True][1]
