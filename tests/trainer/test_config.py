"""DISConfig: its defaults and ranges, and the command line sees all of it. Refusals are in test_bad_input."""

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dis import DISArguments, DISConfig


def config(tmp_path, **values):
    return DISConfig(output_dir=str(tmp_path), use_cpu=True, **values)


def test_defaults_are_valid_and_training_arguments_stay(tmp_path):
    args = config(tmp_path, learning_rate=0.5)
    assert isinstance(args, TrainingArguments) and args.learning_rate == 0.5
    assert (args.temperature, args.proposal, args.design, args.head_mode) == (2.0, "dis", "pps", "auto")


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


COMMAND_LINE = {
    "temperature": 4.0,
    "hard_label_weight": 0.3,
    "divergence": "jsd",
    "jsd_beta": 0.25,
    "scale_by_temperature": False,
    "num_sampled_classes": 32,
    "num_shared_classes": 8,
    "num_tails": 2,
    "num_updated_classes": 16,
    "rank_depth": 64,
    "gradient_error": 0.2,
    "proposal": "teacher",
    "design": "pps",
    "proposal_floor": 0.1,
    "proposal_decay": 0.5,
    "head_mode": "sampled",
    "head_name": "classifier.1",
    "head_learning_rate": 0.02,
    "row_sparse_head": True,
    "offload_moments": True,
    "moment_dtype": "bfloat16",
    "probe_steps": 10,
    "exact_warmup_steps": 3,
}


def parse(tmp_path, *flags):
    return HfArgumentParser(DISConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags])[0]


def test_the_command_line_sets_the_field_of_another_divergence(tmp_path):
    assert parse(tmp_path, "--divergence", "skew_kl", "--skew_alpha", "0.2").skew_alpha == 0.2


def test_the_command_line_sets_every_field(tmp_path):
    own = {name for name in DISConfig.__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__}
    of_another = {"skew_alpha"}  # refused beside "jsd"
    assert own == set(COMMAND_LINE) | of_another, "a field is missing from this test"
    flags = [text for name, value in COMMAND_LINE.items() for text in (f"--{name}", str(value))]
    args = parse(tmp_path, *flags)
    assert {name: getattr(args, name) for name in COMMAND_LINE} == COMMAND_LINE
    assert parse(tmp_path).head_name is None and parse(tmp_path).head_learning_rate is None


@pytest.mark.parametrize("field", ["proposal", "design", "head_mode", "moment_dtype"])
def test_the_command_line_lists_the_choices(tmp_path, field, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, f"--{field}", "nonsense")
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_the_settings_of_the_method_are_taken_out_of_a_config(tmp_path):
    found = config(tmp_path, **COMMAND_LINE).settings()
    assert type(found) is DISArguments and found == DISArguments(**COMMAND_LINE)


def test_every_field_has_a_help_text():
    for name in COMMAND_LINE:
        assert DISConfig.__dataclass_fields__[name].metadata["help"]
