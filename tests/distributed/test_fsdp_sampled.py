"""Students whose heads FSDP2 shards (gloo): rows stay sharded in sampled steps, and train as those of whole heads."""

import fsdp_sampled_worker as worker
import pytest
from launch import two_processes
from tiny_models import assert_near


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("sampled"), "fast")


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("all"), "slow")


def assert_trains_as_a_whole_one(ranks, case):
    tolerance = 1e-10 if case[-1] == "float64" else 1e-6
    for rank in ranks:
        found, expected = rank[case]
        size = max(float(one.abs().max()) for one in expected.values())
        assert_near(found, expected, tolerance * max(1, size))
        assert max(float(expected[name].abs().max()) for name in ("classifier.weight", "classifier.bias")) > 1e-3


@pytest.mark.parametrize("case", worker.cases(), ids=", ".join)
def test_a_student_trains_as_a_whole_one(ranks, case):
    assert_trains_as_a_whole_one(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", worker.slow_cases(), ids=", ".join)
def test_all_layouts(all_ranks, case):
    assert_trains_as_a_whole_one(all_ranks, case)


def test_bytes_that_a_step_sends(ranks):
    for rank in ranks:
        for few, many in rank["bytes"].values():
            assert 0 < many < 1.05 * few  # samples may have more classes in common
        by_rows, by_features, chosen = (rank["bytes"][way][0] for way in (*worker.WAYS, None))
        assert chosen == by_rows != by_features  # 3,220 bytes in place of 4,608
        few, many = rank["bytes", "gathered"]
        added = (worker.SIZES[1] - worker.SIZES[0]) * (16 + 1) * 4
        assert added <= many - few
        assert few > max(by_rows, by_features)


@pytest.mark.parametrize("name", ["tied", "tied, row-sparse"])
def test_a_head_that_shares_its_weight_with_an_embedding(ranks, name):
    for rank in ranks:
        found, expected = rank[name]
        assert_near(found, expected, 1e-10)
        weight = expected["bert.embeddings.word_embeddings.weight"]
        assert int((weight != 0).any(1).sum()) > 8


@pytest.mark.parametrize("way", worker.WAYS)
def test_a_sample_of_the_classes_updates_the_head_without_bias(ranks, way):
    for rank in ranks:
        found = rank["updated"][way]
        for name in ("weight", "bias"):
            expected = found[f"all.{name}"]
            size = float(expected.abs().max())
            assert size > 0.1
            assert_near({name: found[f"sampled.{name}"]}, {name: expected}, 0.02 * size)
        assert 0 < found["sampled.touched"] < found["all.touched"]


@pytest.mark.parametrize("name", ["mixed", "mixed, row-sparse"])
def test_mixed_precision(ranks, name):
    for rank in ranks:
        found, expected = rank[name]
        size = max(float(one.abs().max()) for one in expected.values())
        assert float(expected["classifier.weight"].abs().max()) > 1e-3
        assert_near(found, expected, 1e-2 * size)


def test_all_classes_are_computed_between_sampled_steps(ranks):
    for rank in ranks:
        first, second, expected = rank["evaluated"]
        assert_near({"first": first, "second": second}, {"first": expected, "second": expected}, 1e-12)
