"""Distils a chat model with DISSFTTrainer, by all tokens and by sampled tokens, on what TRL's SFTTrainer prepares.

    accelerate launch examples/run_sft.py --output_dir runs/sft

Without models and data of your own the script makes everything offline. The chats are about the functions of Python's
standard library: the question is a signature, the answer the docstring. The tokenizer has 32,002 tokens and a chat
template. The teacher is a small Llama, trained by plain SFT for some minutes. Two smaller students are distilled, one
exactly and one by DIS. Both take the same number of steps, from the same weights and on the same batches. Examples are
packed, and only the answers are supervised. The first tenth of DIS's steps computes all tokens.
Writes results.json and report.md.

    accelerate launch examples/run_sft.py --output_dir runs/mine --teacher_model_name_or_path big \\
        --model_name_or_path small --dataset_name trl-lib/Capybara --packing --assistant_only_loss

distils a model of your own on chats of your own, in any format that TRL takes. The script takes all flags of
DISSFTConfig; --use_peft trains LoRA adapters. Needs pip install "hf_dis[trl]".
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import sft_task
import torch
from accelerate import PartialState
from clm_task import build_student
from transformers import AutoTokenizer, set_seed

from hf_dis.integrations.trl import DISSFTConfig, DISSFTTrainer

METHODS = {"exact": "exact KD", "dis": "DIS"}
# For students with random weights; with --model_name_or_path the defaults are those of DISSFTConfig.
FROM_SCRATCH = {
    "methods": list(METHODS),
    "max_steps": 80,
    "max_length": 128,
    "packing": True,
    "assistant_only_loss": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "head_learning_rate": 3.2e-2,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "temperature": 1.0,
    "hard_label_weight": 0.0,
    "head_mode": "sampled",
    "num_shared_classes": 4096,
    "num_tails": 4,
    "row_sparse_head": True,
    "exact_warmup_steps": 0.1,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 25,
    "save_strategy": "no",
}


@dataclass
class SftArguments:
    """Sources of models and chats, and the methods to compare."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher; a small Llama, trained first, if not given."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The initial student; a small Llama with random weights if not given."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset of chats, or of prompts and completions; docstrings if there are no files either."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Files to train on: JSON, JSON lines, Parquet or CSV."}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Files to evaluate on; a twentieth of the chats if not given."}
    )
    max_eval_chats: int = field(default=200, metadata={"help": "Chats to evaluate on, at most."})
    methods: list[str] = field(
        default_factory=lambda: ["dis"],
        metadata={"help": f"Methods to run, of {', '.join(METHODS)}; all of them without model_name_or_path."},
    )
    teacher_steps: int = field(default=240, metadata={"help": "Steps of the teacher's training."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters of the student only."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})


def load_models(arguments: SftArguments, args: DISSFTConfig, splits):
    """The teacher or its name, a function that makes a student or its name, and the tokenizer."""
    name = arguments.model_name_or_path or arguments.teacher_model_name_or_path
    with args.main_process_first(desc="loading the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name) if name else sft_task.chat_tokenizer(32_000)
    teacher = arguments.teacher_model_name_or_path
    if teacher is None:
        print(f"Training the teacher for {arguments.teacher_steps} steps ...", flush=True)
        teacher = sft_task.train_teacher(splits, tokenizer, arguments.teacher_steps, args)

    def student():
        return arguments.model_name_or_path or build_student(len(tokenizer))

    return teacher, student, tokenizer


def adapters(arguments: SftArguments):
    """The configuration of LoRA on all linear layers but the head, if adapters are wanted."""
    if not arguments.use_peft:
        return None
    # Imported here: without --use_peft the script runs without peft.
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def distil(method: str, models, splits, arguments: SftArguments, args: DISSFTConfig) -> dict:
    """Trains and evaluates one student; returns the record for results.json."""
    teacher, student, tokenizer = models
    args = copy.copy(args)
    if len(arguments.methods) > 1:
        args.output_dir = str(Path(args.output_dir) / method)
    if method == "exact":
        args.head_mode, args.row_sparse_head = "exact", False
    set_seed(args.seed)
    trainer = DISSFTTrainer(
        student(),
        teacher,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        peft_config=adapters(arguments),
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    distiller, exact = trainer.distiller, trainer.distiller.mode == "exact"
    return {
        "method": method,
        "vocab": distiller.num_classes,
        "sampled": distiller.num_classes if exact else distiller.sampler.columns,
        "steps": trainer.state.global_step,
        "exact_steps": trainer.state.max_steps if exact else args.get_exact_warmup_steps(trainer.state.max_steps),
        "steps_per_second": trained["train_steps_per_second"],
        "kl": metrics["eval_kl"],
        "perplexity": math.exp(metrics["eval_ce_loss"]),
    }


def write_report(output: Path, records: list[dict], minutes: float) -> None:
    """Writes results.json, and report.md with a line per student; prints the report."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        f"# Distilling a chat model of {records[0]['vocab']:,} tokens",
        "",
        f"{torch.get_num_threads()} threads; the whole run took {minutes:.1f} minutes. Quality is measured on chats "
        "held out of training, KL to the teacher at temperature 1. The teacher's forward is part of a step.",
        "",
        "| method | student logits per token | steps | on all tokens | steps per second | perplexity "
        "| KL to teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {METHODS[record['method']]} | {record['sampled']:,} | {record['steps']} | {record['exact_steps']} "
        f"| {record['steps_per_second']:.2f} | {record['perplexity']:.1f} | {record['kl']:.3f} |"
        for record in records
    ]
    (output / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    arguments, args = sft_task.parsed((SftArguments, DISSFTConfig), METHODS, FROM_SCRATCH)

    started = time.perf_counter()
    with args.main_process_first(desc="loading chats"):
        splits = sft_task.load_chats(
            arguments.dataset_name, arguments.dataset_config_name, arguments.train_files, arguments.validation_files
        )
    splits["validation"] = splits["validation"].take(min(arguments.max_eval_chats, len(splits["validation"])))
    models = load_models(arguments, args, splits)
    records = []
    for method in (method for method in METHODS if method in arguments.methods):
        print(f"Distilling by {method!r} ...", flush=True)
        records.append(distil(method, models, splits, arguments, args))
    if args.process_index == 0:
        write_report(Path(args.output_dir), records, (time.perf_counter() - started) / 60)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
