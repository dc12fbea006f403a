"""DISConfig: its defaults and ranges, and the command line sees all of it. Refusals are in test_bad_input."""

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dis import DISConfig, SamplerSpec, make_sampler


def config(tmp_path, **values):
    return DISConfig(output_dir=str(tmp_path), use_cpu=True, **values)


def test_defaults_are_valid_and_training_arguments_stay(tmp_path):
    args = config(tmp_path, learning_rate=0.5)
    assert isinstance(args, TrainingArguments) and args.learning_rate == 0.5
    assert (args.temperature, args.proposal, args.sampler, args.head_mode) == (2.0, "dis", "pps", "auto")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.01),
        ("hard_label_weight", 0.0),
        ("hard_label_weight", 1.0),
        ("num_sampled_classes", 1),
        ("num_shared_classes", 0),
        ("rank_depth", 1),
        ("proposal_floor", 1.0),
        ("proposal_decay", 0.0),
        ("probe_steps", 0),
        ("exact_warmup_steps", 0),
        ("head_learning_rate", 0.0),
        ("proposal", "topk"),
        ("head_mode", "exact"),
    ],
)
def test_the_ends_of_the_ranges_are_taken(tmp_path, name, value):
    assert getattr(config(tmp_path, **{name: value}), name) == value


def test_sampling_with_replacement_needs_the_per_row_layout(tmp_path):
    with pytest.raises(ValueError, match=r"sampler is 'replacement'.*num_shared_classes=0"):
        config(tmp_path, design="replacement", num_shared_classes=8)
    assert config(tmp_path, design="replacement", num_shared_classes=0).sampler == "replacement"


def test_several_tails_need_shared_classes(tmp_path):
    with pytest.raises(ValueError, match=r"num_tails is 4.*set num_shared_classes"):
        config(tmp_path, num_tails=4, num_shared_classes=0)
    with pytest.raises(ValueError, match=r"num_tails is 4.*set num_shared_classes"):
        config(tmp_path, num_tails=4, proposal="topk")
    assert config(tmp_path, num_tails=4).sampling_arguments()["num_tails"] == 4
    assert make_sampler(500, SamplerSpec(num_shared_classes=0)).num_tails == 1


COMMAND_LINE = {
    "temperature": 4.0,
    "hard_label_weight": 0.3,
    "num_sampled_classes": 32,
    "num_shared_classes": 8,
    "num_tails": 2,
    "num_updated_classes": 16,
    "rank_depth": 64,
    "proposal": "teacher",
    "design": "pps",
    "proposal_floor": 0.1,
    "proposal_decay": 0.5,
    "head_mode": "sampled",
    "head_name": "classifier.1",
    "head_learning_rate": 0.02,
    "row_sparse_head": True,
    "probe_steps": 10,
    "exact_warmup_steps": 3,
}


def parse(tmp_path, *flags):
    return HfArgumentParser(DISConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags])[0]


def test_the_command_line_sets_every_field(tmp_path):
    own = {name for name in DISConfig.__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__}
    assert own == set(COMMAND_LINE), "a field is missing from this test"
    flags = [text for name, value in COMMAND_LINE.items() for text in (f"--{name}", str(value))]
    args = parse(tmp_path, *flags)
    assert {name: getattr(args, name) for name in COMMAND_LINE} == COMMAND_LINE
    assert parse(tmp_path).head_name is None and parse(tmp_path).head_learning_rate is None


@pytest.mark.parametrize("field", ["proposal", "sampler", "head_mode"])
def test_the_command_line_lists_the_choices(tmp_path, field, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, f"--{field}", "nonsense")
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_its_sampling_arguments_are_those_of_make_sampler(tmp_path):
    given = {"num_sampled_classes": 6, "rank_depth": 9, "num_shared_classes": 0, "design": "replacement"}
    sampler = make_sampler(1_000, SamplerSpec(**config(tmp_path, **given).sampling_arguments()))
    assert (sampler.num_sampled, sampler.rank_depth, sampler.num_shared) == (6, 9, 0)
    assert sampler.sampler == "replacement"


def test_what_is_not_given_depends_on_model_and_teacher(tmp_path):
    def sizes(shared=None, design="pps", **given):
        found = config(tmp_path, num_shared_classes=shared, sampler=sampler).sampling_arguments(**given)
        return tuple(found[f"num_{name}"] for name in ("sampled_classes", "shared_classes", "tails"))

    assert sizes() == (32, 512, 4) and sizes(is_lm=True) == (16, 1024, 4)
    assert sizes(shared=0) == sizes(design="replacement") == (128, 0, 1)
    assert sizes(shared=0, is_lm=True) == (16, 0, 1)
    assert sizes(shared=0, stored_sample_size=9) == sizes(shared=0, stored_sample_size=9, is_lm=True) == (512, 0, 1)
    assert sizes(stored_sample_size=9) == (9, 512, 4)  # all of the stored tail
    assert sizes(is_lm=True, stored_sample_size=9) == (9, 1024, 4) and sizes(stored_sample_size=0) == (1, 512, 4)
    given = config(tmp_path, num_sampled_classes=3, num_tails=2).sampling_arguments(stored_sample_size=9)
    assert (given["num_sampled_classes"], given["num_tails"]) == (3, 2)
    depths = [config(tmp_path).sampling_arguments(is_lm)["rank_depth"] for is_lm in (False, True)]
    assert depths == [None, 16]


def test_a_row_sparse_head_is_updated_by_a_part_of_what_was_drawn_where_classes_are_shared(tmp_path):
    def updated(**given):
        return config(tmp_path, **given).sampling_arguments()["num_updated_classes"]

    assert updated() is None and updated(row_sparse_head=True) == 16
    assert config(tmp_path, row_sparse_head=True).sampling_arguments(is_lm=True)["num_updated_classes"] == 32
    assert updated(row_sparse_head=True, num_shared_classes=0) is None
    assert updated(row_sparse_head=True, num_updated_classes=5) == 5


def test_every_field_has_a_help_text():
    for name in COMMAND_LINE:
        assert DISConfig.__dataclass_fields__[name].metadata["help"]
