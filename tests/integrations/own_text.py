"""Prompts, and trainers on tiny Llamas that write to them, for the tests of on-policy distillation."""

from __future__ import annotations

import random
from pathlib import Path

import chats
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from hf_dis.integrations.gkd import DISGKDConfig, DISGKDTrainer
from hf_dis.integrations.on_policy import DISOnPolicyConfig, DISOnPolicyTrainer

# What a test sets where it does not matter, for TRL's trainer too.
HOST = {
    "max_steps": 3,
    "max_completion_length": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_checkpointing": False,
    "bf16": False,
    "learning_rate": 0.1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_steps": 1,
}
OF_GKD = {name: value for name, value in HOST.items() if name != "max_completion_length"}
OF_GKD |= {"max_length": 32, "max_new_tokens": 8, "train_sampling_strategy": "sequential"}
METHOD = {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "rank_depth": 10}
# All classes are sampled with certainty.
ALL = {"num_sampled_classes": 10, "num_shared_classes": chats.V}


def prompts(number: int, form: str = "messages", seed: int = 0) -> Dataset:
    """Prompts of one message, as ``messages`` or as ``text``."""
    words = random.Random(seed)
    said = [" ".join(words.choices(chats.WORDS, k=words.randint(2, 7))) for _ in range(number)]
    if form == "text":
        return Dataset.from_list([{"prompt": f"<user> {text} <assistant>"} for text in said])
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in said])


def _split(keywords: dict, config: type) -> tuple[dict, dict]:
    of_trainer = {name: keywords.pop(name) for name in list(keywords) if name not in config.__dataclass_fields__}
    return of_trainer, keywords


def make_trainer(folder: Path, model=None, teacher_model="made here", **keywords) -> DISOnPolicyTrainer:
    """Keywords: DISOnPolicyConfig's fields, or the trainer's."""
    given, fields = _split(keywords, DISOnPolicyConfig)
    args = DISOnPolicyConfig(**{"output_dir": str(folder / "out"), **chats.QUIET, **HOST, **METHOD, **fields})
    given = {"train_dataset": prompts(48), "processing_class": chats.tokenizer(), **given}
    made = chats.teacher() if isinstance(teacher_model, str) and teacher_model == "made here" else teacher_model
    return DISOnPolicyTrainer(chats.student() if model is None else model, made, args, **given)


def trl_trainer(folder: Path, model, teacher_model, **keywords) -> DistillationTrainer:
    """TRL's own trainer with the same settings as :func:`make_trainer`."""
    given, fields = _split(keywords, DistillationConfig)
    args = DistillationConfig(**{"output_dir": str(folder / "trl"), **chats.QUIET, **HOST, **fields})
    given = {"train_dataset": prompts(48), "processing_class": chats.tokenizer(), **given}
    return DistillationTrainer(model, teacher_model, args, **given)


def gkd_trainer(folder: Path, model=None, teacher_model="made here", **keywords) -> DISGKDTrainer:
    """Keywords: DISGKDConfig's fields, or the trainer's."""
    given, fields = _split(keywords, DISGKDConfig)
    args = DISGKDConfig(**{"output_dir": str(folder / "gkd"), **chats.QUIET, **OF_GKD, **METHOD, **fields})
    given = {"train_dataset": chats.chats(48), "processing_class": chats.tokenizer(), **given}
    made = chats.teacher() if isinstance(teacher_model, str) and teacher_model == "made here" else teacher_model
    return DISGKDTrainer(chats.student() if model is None else model, made, args, **given)


def trl_gkd_trainer(folder: Path, model, teacher_model, **keywords) -> GKDTrainer:
    """TRL's own trainer with the same settings as :func:`gkd_trainer`."""
    given, fields = _split(keywords, GKDConfig)
    args = GKDConfig(**{"output_dir": str(folder / "trl"), **chats.QUIET, **OF_GKD, **fields})
    given = {"train_dataset": chats.chats(48), "processing_class": chats.tokenizer(), **given}
    return GKDTrainer(model, teacher_model, args, **given)
