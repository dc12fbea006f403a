"""SamplerSpec and DISArguments: settings that exclude each other, and defaults that depend on the task."""

from dataclasses import fields

import pytest

from hf_dis import DISArguments, SamplerSpec, make_sampler

# Settings are refused alike where they are given to the sampler and where they are given to the method.
KINDS = [SamplerSpec, DISArguments]


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_replacement_excludes_shared_tails(kind):
    with pytest.raises(ValueError, match=r"design is 'replacement'.*num_shared_classes=0"):
        kind(design="replacement", num_shared_classes=8)
    assert kind(design="replacement", num_shared_classes=0).design == "replacement"


@pytest.mark.parametrize("kind", KINDS)
def test_several_tails_need_shared_classes(kind):
    with pytest.raises(ValueError, match=r"num_tails is 4.*set num_shared_classes"):
        kind(num_tails=4, num_shared_classes=0)
    with pytest.raises(ValueError, match=r"num_tails is 4.*set num_shared_classes"):
        kind(num_tails=4, proposal="topk")
    assert kind(num_tails=4).num_tails == SamplerSpec(num_tails=4).resolved().num_tails == 4
    assert make_sampler(500, SamplerSpec(num_shared_classes=0)).num_tails == 1


def test_a_row_sparse_head_excludes_computing_all_classes():
    with pytest.raises(ValueError, match=r"row_sparse_head is set and head_mode is 'exact'"):
        DISArguments(row_sparse_head=True, head_mode="exact")


def test_the_specification_of_the_sampler_has_the_settings_as_given():
    given = {"num_sampled_classes": 6, "rank_depth": 9, "num_shared_classes": 0, "design": "replacement"}
    spec = DISArguments(**given).sampler_spec()
    assert spec == SamplerSpec(**given)
    sampler = make_sampler(1_000, spec)
    assert (sampler.num_sampled, sampler.rank_depth, sampler.num_shared) == (6, 9, 0)
    assert sampler.design == "replacement"


def test_the_method_has_every_setting_of_the_sampler_with_its_default():
    method = {one.name: one for one in fields(DISArguments)}
    for one in fields(SamplerSpec):
        assert (method[one.name].default, method[one.name].metadata) == (one.default, one.metadata), one.name


def test_defaults_depend_on_the_task_and_the_teacher():
    def sizes(shared=None, design="pps", **given):
        found = SamplerSpec(num_shared_classes=shared, design=design).resolved(**given)
        return tuple(getattr(found, f"num_{name}") for name in ("sampled_classes", "shared_classes", "tails"))

    assert sizes() == (96, 416, 16) and sizes(vocab_size=32_000) == (16, 1024, 16)
    tails = {50: 1024, 151_936: 1024, 185_000: 1024, 186_000: 2048, 262_144: 2048, 10**6: 4096}
    assert {size: sizes(vocab_size=size)[1] for size in tails} == tails
    assert sizes(shared=0) == sizes(design="replacement") == (128, 0, 1)
    assert sizes(shared=0, vocab_size=50) == (16, 0, 1)
    assert sizes(shared=0, stored_sample_size=9) == sizes(shared=0, stored_sample_size=9, vocab_size=50) == (512, 0, 1)
    assert sizes(stored_sample_size=9) == (9, 512, 16)  # the whole stored sample
    assert sizes(vocab_size=50, stored_sample_size=9) == (9, 1024, 16) and sizes(stored_sample_size=0) == (1, 512, 16)
    given = SamplerSpec(num_sampled_classes=3, num_tails=2).resolved(stored_sample_size=9)
    assert (given.num_sampled_classes, given.num_tails) == (3, 2)


def test_the_depth_follows_the_number_of_sampled_classes():
    def depth(**given):
        return SamplerSpec(**given).resolved().rank_depth

    assert depth() == 96 and depth(num_sampled_classes=5) == 5 and depth(rank_depth=133) == 133
    assert depth(num_shared_classes=0) == 256
    assert SamplerSpec().resolved(vocab_size=50).rank_depth == 16
    assert SamplerSpec(num_shared_classes=0).resolved(vocab_size=50).rank_depth == 32
    assert SamplerSpec().resolved(stored_sample_size=9).rank_depth is None  # the depth of the cache


@pytest.mark.parametrize("given", [{"row_sparse_head": False}, {"head_mode": "exact"}], ids=str)
@pytest.mark.parametrize(("setting", "wanted"), [("offload_moments", True), ("moment_dtype", "float32")])
def test_moments_of_a_dense_head_are_as_they_are(given, setting, wanted):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"{setting} is set and {name} is {value!r}: .* leave {setting} out"):
        DISArguments(**{setting: wanted}, **given)


def test_a_row_sparse_head_is_updated_by_a_part_of_the_sampled_classes_where_there_is_a_shared_tail():
    def updated(vocab_size=None, row_sparse=True, **given):
        return SamplerSpec(**given).resolved(vocab_size=vocab_size, row_sparse=row_sparse).num_updated_classes

    assert updated(row_sparse=False) is None and updated() == 16
    assert updated(vocab_size=50) == 32 and updated(vocab_size=262_144) == 64
    assert updated(num_shared_classes=4096) == updated(vocab_size=50, num_shared_classes=4096) == 128
    assert updated(num_shared_classes=64) == 16
    assert updated(num_shared_classes=0) is None
    assert updated(num_updated_classes=5) == 5


def test_a_resolved_specification_is_resolved_already():
    for given in ({}, {"vocab_size": 50}, {"row_sparse": True}, {"vocab_size": 10**6, "row_sparse": True}):
        spec = SamplerSpec().resolved(**given)
        assert spec.resolved(**given) == spec
