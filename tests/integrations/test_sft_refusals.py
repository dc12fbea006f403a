"""Settings that SFT with the step of the method refuses before training, with the remedy."""

import importlib
import sys
from types import SimpleNamespace

import chats
import peft
import pytest
import transformers as hf
from chats import make_trainer
from datasets import Dataset
from tiny_models import SMALL
from trl import SFTConfig

from hf_dis import cache_teacher_targets
from hf_dis.errors import DataError
from hf_dis.integrations import require
from hf_dis.integrations.sft_checks import check_trainer, logger
from hf_dis.integrations.trl import DISSFTConfig, DISSFTTrainer

# TRL


def test_trl_is_missing(monkeypatch):
    monkeypatch.setattr("hf_dis.integrations.version", raising)
    monkeypatch.delitem(sys.modules, "hf_dis.integrations.trl")
    with pytest.raises(ImportError, match=r'needs trl 1\.16 or newer.*not installed: run pip install "hf_dis\[trl\]"'):
        importlib.import_module("hf_dis.integrations.trl")


def raising(package):
    raise importlib.metadata.PackageNotFoundError(package)


@pytest.mark.parametrize("found", ["0.29.1", "1.2.0", "1.15.9"])
def test_trl_is_too_old(monkeypatch, found):
    monkeypatch.setattr("hf_dis.integrations.version", lambda package: found)
    with pytest.raises(ImportError, match=rf'needs trl 1\.16 .*installed as version {found}: run .*"hf_dis\[trl\]"'):
        require("trl", "1.16")


@pytest.mark.parametrize("found", ["1.16", "1.16.0", "2.0.1"])
def test_trl_is_new_enough(monkeypatch, found):
    monkeypatch.setattr("hf_dis.integrations.version", lambda package: found)
    require("trl", "1.16")


# Settings


def test_a_loss_of_sft(tmp_path):
    with pytest.raises(ValueError, match=r"loss_type is 'dft'.*leave loss_type at 'nll'"):
        DISSFTConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="dft")


def test_the_old_name_of_the_default_loss(tmp_path):
    assert DISSFTConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="chunked_nll").loss_type == "nll"


def test_settings_of_the_method(tmp_path):
    with pytest.raises(ValueError, match="temperature is 0"):
        DISSFTConfig(output_dir=str(tmp_path), use_cpu=True, temperature=0)


def test_a_plain_configuration(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a SFTConfig: DISSFTTrainer needs a DISSFTConfig"):
        DISSFTTrainer(chats.student(), chats.teacher(), args, train_dataset=chats.chats(2))


def test_liger_kernels(tmp_path):
    with pytest.raises(ValueError, match=r"use_liger_kernel.*False"):
        make_trainer(tmp_path, use_liger_kernel=True)


def test_a_loss_function(tmp_path):
    with pytest.raises(ValueError, match=r"compute_loss_func.*override compute_loss"):
        make_trainer(tmp_path, compute_loss_func=lambda *args, **kwargs: 0)


def test_label_smoothing(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1.*set it to 0"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)


def test_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="no teacher: pass teacher_model"):
        make_trainer(tmp_path, teacher_model=None)


# Students


def test_a_head_that_an_adapter_wraps(tmp_path):
    """Trainable tokens of tied weights reach the head too, which then is not a linear layer."""
    student = chats.student(tie_word_embeddings=True)
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 5], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"output head 'base_model.model.lm_head' is a peft.*leave it out of"):
        make_trainer(tmp_path, student, peft_config=config)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_an_adapter_of_the_head(tmp_path, is_wrapped):
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    student, given = chats.student(), {"peft_config": config}
    if is_wrapped:
        student, given = peft.get_peft_model(student, config), {}
    with pytest.raises(ValueError, match=r"adapter .*lm_head.*target_modules"):
        make_trainer(tmp_path, student, **given)


class Processor(hf.ProcessorMixin):
    """Of text alone, but a processor, as vision-language models have one."""

    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)


def test_vision_language_models(tmp_path):
    text = {"vocab_size": chats.V, "model_type": "llama", **SMALL}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlavaConfig(text_config=text, vision_config={**vision, "model_type": "clip_vision_model"})
    student = hf.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"a Processor, .*vision-language models are unsupported; pass a causal"):
        make_trainer(tmp_path, student, processing_class=Processor(chats.tokenizer()))


# Teachers


OTHER = chats.TEMPLATE.replace("<user>", "<eos>")


def test_another_chat_template(tmp_path):
    with pytest.raises(ValueError, match=r"different chat templates.*'<user> .* student's and '<eos> .*chat_template"):
        make_trainer(tmp_path, teacher_processing_class=chats.tokenizer(OTHER))


def test_another_chat_template_of_a_teacher_by_name(tmp_path):
    chats.teacher().save_pretrained(tmp_path / "teacher")
    chats.tokenizer(OTHER).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="different chat templates"):
        make_trainer(tmp_path, teacher_model=str(tmp_path / "teacher"))


@pytest.mark.parametrize("form", ["prompt", "from and value"])
def test_another_chat_template_for_chats_of_other_forms(tmp_path, form):
    if form == "prompt":
        data = chats.chats(8, "prompt")
    else:
        turns = [{"from": "user", "value": "w1 w2"}, {"from": "assistant", "value": "w3"}]
        data = Dataset.from_list([{"conversations": turns}] * 8)
    with pytest.raises(ValueError, match="different chat templates"):
        make_trainer(tmp_path, train_dataset=data, teacher_processing_class=chats.tokenizer(OTHER))


SAME_TEXT = {
    "the same": chats.TEMPLATE,
    "without markers": chats.TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "none": None,
}


@pytest.mark.parametrize("template", SAME_TEXT)
def test_a_chat_template_that_gives_the_same_text(tmp_path, template):
    teacher_tokenizer = chats.tokenizer(SAME_TEXT[template])
    make_trainer(tmp_path, teacher_processing_class=teacher_tokenizer, assistant_only_loss=True)


def test_templates_are_not_compared_where_there_are_no_chats(tmp_path):
    make_trainer(tmp_path, train_dataset=chats.chats(8, "text"), teacher_processing_class=chats.tokenizer(OTHER))


def test_another_tokenizer(tmp_path):
    other = chats.tokenizer()
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)(
        {**other.get_vocab(), "w0": 5, "w1": 4}, unk_token="<pad>"
    )
    with pytest.raises(ValueError, match=r"different tokenizers: of 40 ids 2 mean different.*one tokenizer"):
        make_trainer(tmp_path, teacher_processing_class=other)


# Caches


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A cache of the examples, prepared by SFT and not packed."""
    folder = tmp_path_factory.mktemp("unpacked")
    prepared = make_trainer(folder)
    given = {"data_collator": prepared.data_collator, "processing_class": prepared.processing_class}
    return cache_teacher_targets(chats.teacher(), prepared.train_dataset, folder / "cache", **given)


CACHED = {"teacher_model": None, "rank_depth": None}


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
def test_packing_with_a_cache_of_unpacked_examples(tmp_path, unpacked, strategy):
    trainer = make_trainer(tmp_path, teacher_cache=unpacked, packing=True, packing_strategy=strategy, **CACHED)
    with pytest.raises(DataError, match="cache"):
        trainer.train()


@pytest.mark.parametrize(("batch_size", "processes", "told"), [(2, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_examples_that_an_evaluation_counts_twice_are_told(caplog, batch_size, processes, told):
    type(logger).warning_once.cache_clear()
    trainer = SimpleNamespace(
        processing_class=chats.tokenizer(),
        padding_free=True,
        eval_dataset=[1, 2, 3],
        args=SimpleNamespace(per_device_eval_batch_size=batch_size),
        accelerator=SimpleNamespace(num_processes=processes),
    )
    check_trainer(trainer)
    assert caplog.text.count("set per_device_eval_batch_size=1") == told


def test_a_tensor_parallel_student(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dis.integrations.trl_host.is_tensor_parallel", lambda model: True)
    with pytest.raises(
        ValueError, match=r"student is tensor-parallel, and DISSFTTrainer .*use DISDistillationTrainer"
    ):
        make_trainer(tmp_path)
