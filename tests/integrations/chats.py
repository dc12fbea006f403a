"""Chats of whole words, a tokenizer for them, and trainers on tiny Llamas, for the tests of SFT."""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_dis.integrations.trl import DISSFTConfig, DISSFTTrainer

SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
WORDS = [f"w{number}" for number in range(36)]
V = len(SPECIAL) + len(WORDS)
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant> "
    "{% generation %}{{ message.content }} <eos>{% endgeneration %} "
    "{% else %}<user> {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# What a test sets where it does not matter; all classes are sampled with certainty.
DEFAULTS = {
    "max_steps": 3,
    "max_length": 32,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_checkpointing": False,
    "bf16": False,
    "learning_rate": 0.1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "logging_steps": 1,
    "head_mode": "sampled",
    "num_sampled_classes": 6,
    "num_shared_classes": 8,
    "rank_depth": 10,
    "hard_label_weight": 0.3,
}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    found.chat_template = template
    return found


def _said(words: random.Random) -> str:
    return " ".join(words.choices(WORDS, k=words.randint(2, 7)))


def chats(number: int, form: str = "messages", seed: int = 0) -> Dataset:
    """Chats of one or two exchanges, in one of TRL's forms: ``messages``, ``prompt`` with ``completion``, ``text``."""
    words = random.Random(seed)
    rows = []
    for _ in range(number):
        messages = [
            {"role": role, "content": _said(words)}
            for _ in range(words.randint(1, 2))
            for role in ("user", "assistant")
        ]
        if form == "messages":
            rows.append({"messages": messages})
        elif form == "prompt":
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
        else:
            rows.append({"text": messages[0]["content"]})
    return Dataset.from_list(rows)


def student(seed: int = 0, spread: float = 3, **config):
    return llama(V, seed=seed, spread=spread, eos_token_id=1, bos_token_id=1, **config)


def teacher(seed: int = 1):
    return student(seed, spread=30)


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64; Llama's own normalisation computes in float32, whose rounding depends on the batch."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon))
    return model.double()


def make_trainer(folder: Path, model=None, teacher_model="made here", **keywords) -> DISSFTTrainer:
    """Keywords: DISSFTConfig's fields, or the trainer's."""
    given = {name: keywords.pop(name) for name in list(keywords) if name not in DISSFTConfig.__dataclass_fields__}
    args = DISSFTConfig(**{"output_dir": str(folder / "out"), **QUIET, **DEFAULTS, **keywords})
    given = {"train_dataset": chats(16), "processing_class": tokenizer(), **given}
    made = teacher() if isinstance(teacher_model, str) and teacher_model == "made here" else teacher_model
    return DISSFTTrainer(student() if model is None else model, made, args, **given)
