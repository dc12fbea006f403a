"""Refusals of the on-policy hosts, with their remedies, and warnings about unexpected data."""

import importlib
import sys

import chats
import own_text
import pytest
import transformers as hf
from datasets import Dataset
from fake_processes import one_of_four
from own_text import gkd_trainer, make_trainer
from tiny_models import llama
from torch.distributed.fsdp import fully_shard
from trl import DistillationConfig

from hf_dis.integrations.gkd import DISGKDConfig
from hf_dis.integrations.on_policy import DISOnPolicyConfig, DISOnPolicyTrainer
from hf_dis.integrations.on_policy_checks import (
    check_completions,
    check_gkd_teacher,
    check_prompt_tokens,
    logger,
    warn_of_lengths,
)

CONFIGS = {"on policy": DISOnPolicyConfig, "gkd": DISGKDConfig}
MAKERS = {"on policy": make_trainer, "gkd": gkd_trainer}


def config(kind, tmp_path, **settings):
    return CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("module", ["on_policy", "gkd"])
def test_trl_is_missing(monkeypatch, module):
    def raising(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("hf_dis.integrations.version", raising)
    monkeypatch.delitem(sys.modules, f"hf_dis.integrations.{module}")
    with pytest.raises(ImportError, match=r'needs trl 1\.16 or newer.*not installed: run pip install "hf_dis\[trl\]"'):
        importlib.import_module(f"hf_dis.integrations.{module}")


# One place for the divergence and for the temperature


@pytest.mark.parametrize(
    ("given", "divergence", "jsd_beta", "beta"),
    [
        ({"beta": 0}, "forward_kl", None, 0.0),
        ({"beta": 1.0}, "reverse_kl", None, 1.0),
        ({"beta": 0.3}, "jsd", 0.3, 0.3),
        ({"divergence": "forward_kl"}, "forward_kl", None, 0.0),
        ({"divergence": "reverse_kl"}, "reverse_kl", None, 1.0),
        ({"divergence": "jsd"}, "jsd", 0.5, 0.5),
        ({"divergence": "jsd", "jsd_beta": 0.3}, "jsd", 0.3, 0.3),
        ({"divergence": "jsd", "beta": 0.3}, "jsd", 0.3, 0.3),
        ({"divergence": "skew_kl", "skew_alpha": 0.2}, "skew_kl", None, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_beta_and_divergence_are_one(tmp_path, kind, given, divergence, jsd_beta, beta):
    args = config(kind, tmp_path, **given)
    assert (args.divergence, args.jsd_beta, args.beta) == (divergence, jsd_beta, beta)
    again = config(kind, tmp_path, divergence=args.divergence, jsd_beta=args.jsd_beta, beta=args.beta, **(
        {"skew_alpha": 0.2} if divergence == "skew_kl" else {}
    ))  # fmt: skip
    assert again.settings() == args.settings() and again.settings().divergence == divergence


def test_the_defaults_are_trls(tmp_path):
    ours, gkd = config("on policy", tmp_path), config("gkd", tmp_path)
    assert (ours.divergence, ours.beta, ours.temperature, ours.settings().temperature) == ("reverse_kl", 1.0, 1.0, 1.0)
    assert (gkd.divergence, gkd.beta, gkd.temperature, gkd.settings().temperature) == ("jsd", 0.5, 0.9, 1.0)
    for args in (ours, gkd):
        assert not args.scale_by_temperature and args.hard_label_weight == 0
    assert ours.learning_rate == 1e-6 and ours.max_completion_length == 512 and gkd.max_new_tokens == 128


def test_the_temperature_of_the_loss_follows_that_of_sampling(tmp_path):
    assert config("on policy", tmp_path, temperature=0.7).settings().temperature == 0.7
    assert config("on policy", tmp_path, temperature=0.7, kd_temperature=2.0).settings().temperature == 2.0
    assert config("gkd", tmp_path, temperature=0.7).settings().temperature == 1.0
    assert config("gkd", tmp_path, temperature=0.7, kd_temperature=None).settings().temperature == 0.7


REFUSED = {
    "beta is 1.0, and divergence is 'forward_kl', for which beta is 0.0: .*give one": (
        {"beta": 1.0, "divergence": "forward_kl"}
    ),
    "beta is 0.3, and divergence is 'jsd' with jsd_beta=0.5.*give one": (
        {"beta": 0.3, "divergence": "jsd", "jsd_beta": 0.5}
    ),
    "beta is 0.2, and divergence is 'jsd' with jsd_beta=0.4": {"beta": 0.2, "jsd_beta": 0.4},
    "jsd_beta is 0.5.*None with divergence='reverse_kl'": {"beta": 1.0, "jsd_beta": 0.5},
    r"beta is 1\.5.*within \[0, 1\]: 0 is the forward KL": {"beta": 1.5},
    "divergence is 'kl'.*forward_kl, reverse_kl, jsd, skew_kl": {"divergence": "kl"},
    "kd_temperature is 0.*above 0": {"kd_temperature": 0},
    "temperature is -1.*above 0": {"temperature": -1},
    "num_tails is 0": {"num_tails": 0},
    "hard_label_weight is 0.1.*its labels are the student's own samples.*noise": {"hard_label_weight": 0.1},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("told", REFUSED)
def test_settings_that_contradict_each_other(tmp_path, kind, told):
    with pytest.raises(ValueError, match=told):
        config(kind, tmp_path, **REFUSED[told])


def test_a_later_contradiction(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.beta = 0.0
    with pytest.raises(ValueError, match=r"beta is 0\.0, and divergence is 'reverse_kl'"):
        trainer.train()


def test_hard_labels_of_given_answers(tmp_path):
    assert config("gkd", tmp_path, lmbda=0.0, hard_label_weight=0.1).settings().hard_label_weight == 0.1


@pytest.mark.parametrize(
    "setting",
    [
        {"packing": True},
        {"padding_free": True},
        {"eval_packing": True},
        {"assistant_only_loss": True},
        {"completion_only_loss": False},
    ],
    ids=str,
)
def test_settings_of_sft_that_gkd_does_not_read(tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, and GKD prepares.*leave {name} out"):
        config("gkd", tmp_path, **setting)


def test_gkd_with_deepspeed(tmp_path):
    args = config("gkd", tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    from hf_dis.integrations.on_policy_checks import check_gkd_config

    with pytest.raises(ValueError, match=r"deepspeed is set.*use DISOnPolicyTrainer"):
        check_gkd_config(args)


def test_gkd_with_a_teacher_that_fsdp_shards():
    with one_of_four(rank=2):
        check_gkd_teacher(llama(11))
        with pytest.raises(
            ValueError, match=r"GKD lets the teacher write answers on each process alone: load .* whole"
        ):
            check_gkd_teacher(fully_shard(llama(11)))


def test_a_plain_configuration(tmp_path):
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a DistillationConfig: DISOnPolicyTrainer needs a DISOnPolicyConfig"):
        DISOnPolicyTrainer(chats.student(), chats.teacher(), args, train_dataset=own_text.prompts(2))


# Teachers


@pytest.mark.parametrize("host", MAKERS)
@pytest.mark.parametrize("name", ["teacher_cache", "eval_teacher_cache"])
def test_caches(tmp_path, host, name):
    with pytest.raises(ValueError, match=f"{name} holds targets of a given text.*pass the teacher itself"):
        MAKERS[host](tmp_path, **{name: "targets"})


@pytest.mark.parametrize("host", MAKERS)
def test_no_teacher(tmp_path, host):
    with pytest.raises(ValueError, match="no teacher: pass teacher_model"):
        MAKERS[host](tmp_path, teacher_model=None)


def test_fields_about_the_teacher_without_effect(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_model_init_kwargs is .*float16.*load the teacher yourself"):
        make_trainer(tmp_path, teacher_model="name", teacher_model_init_kwargs={"dtype": "float16"})
    with pytest.raises(ValueError, match=r"teacher_model_revision is 'main'.*leave teacher_model_revision out"):
        make_trainer(tmp_path, teacher_model="name", teacher_model_revision="main")
    with pytest.raises(ValueError, match="teacher_model is 'one', and teacher_model_name_or_path is 'other'"):
        make_trainer(tmp_path, teacher_model="one", teacher_model_name_or_path="other")


@pytest.mark.parametrize("host", MAKERS)
def test_another_chat_template(tmp_path, host):
    other = chats.tokenizer(chats.TEMPLATE.replace("<user>", "<eos>"))
    with pytest.raises(ValueError, match=r"different chat templates.*'<user> .* student's and '<eos> "):
        MAKERS[host](tmp_path, teacher_processing_class=other)


# Prompts


@pytest.mark.parametrize("host", MAKERS)
def test_messages_without_a_chat_template(tmp_path, host):
    with pytest.raises(ValueError, match=r"lists of messages, and the student's tokenizer has no chat template.*Set"):
        MAKERS[host](tmp_path, processing_class=chats.tokenizer(None))


def test_no_column_of_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"columns messages and no 'prompt'.*needs the column 'prompt'"):
        make_trainer(tmp_path, train_dataset=chats.chats(4))
    with pytest.raises(ValueError, match=r"columns prompt and no 'messages'.*use DISOnPolicyTrainer"):
        gkd_trainer(tmp_path, train_dataset=own_text.prompts(4))


def test_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match="training dataset is empty"):
        make_trainer(tmp_path, train_dataset=Dataset.from_list([]))


def test_gkd_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"processing_class is None.*pass it"):
        gkd_trainer(tmp_path, processing_class=None)


def test_vision_language_models(tmp_path):
    class Processor(hf.ProcessorMixin):
        attributes = ("tokenizer",)
        tokenizer_class = "PreTrainedTokenizerFast"

        def __init__(self, tokenizer, **kwargs):
            super().__init__(tokenizer, **kwargs)

    with pytest.raises(ValueError, match="vision-language models are unsupported"):
        make_trainer(tmp_path, processing_class=Processor(chats.tokenizer()))


def test_prompts_without_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 2 prompts of a batch have no token \(the first one is number 1\)"):
        check_prompt_tokens([[4], []])
    data = Dataset.from_list([{"prompt": text} for text in ("<user> w1", "", "<user> w2", "<user> w3")])
    with pytest.raises(ValueError, match="1 of 4 prompts"):
        make_trainer(tmp_path, train_dataset=data).train()


@pytest.mark.parametrize(("prompt", "told"), [("w1 w2", 1), ("<eos> w1", 0)])
def test_a_chat_template_that_is_left_out_is_told(tmp_path, caplog, prompt, told):
    type(logger).warning_once.cache_clear()
    make_trainer(tmp_path, train_dataset=Dataset.from_list([{"prompt": prompt}] * 4))
    assert caplog.text.count("without a special token, and the tokenizer has a chat template") == told


# Completions


def test_empty_completions(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"2 of 3 completions of a batch are empty.*max_completion_length to 1"):
        check_completions([[], [5], []])
    monkeypatch.setattr("trl.DistillationTrainer._generate_single_turn", lambda self, ids, *rest: [[] for _ in ids])
    with pytest.raises(ValueError, match="4 of 4 completions"):
        make_trainer(tmp_path).train()


@pytest.mark.parametrize("host", MAKERS)
def test_completions_that_all_reach_the_limit_are_told_once(tmp_path, caplog, host):
    name = "max_completion_length" if host == "on policy" else "max_new_tokens"
    type(logger).warning_once.cache_clear()
    settings = {"lmbda": 1.0} if host == "gkd" else {}
    MAKERS[host](tmp_path, **{name: 1}, **settings).train()
    assert caplog.text.count(f"all completions of a batch were cut at {name}=1, none with an end-of-text") == 1


@pytest.mark.parametrize(
    ("longest", "clipped", "told"),
    [(8.0, 1.0, "cut at limit=8"), (1.0, 0.0, "end-of-text token alone"), (8.0, 0.75, ""), (2.0, 0.0, "")],
)
def test_lengths_that_teach_little(caplog, longest, clipped, told):
    type(logger).warning_once.cache_clear()
    warn_of_lengths(longest, clipped, ("limit", 8))
    assert (told in caplog.text) if told else not caplog.text
