"""On-policy distillation: the student writes, and learns from the teacher on its own text.

    accelerate launch --num_processes 1 examples/run_on_policy.py --output_dir runs/on_policy

makes everything offline. Prompts are signatures of functions of Python's standard library. A small Llama is trained
by plain SFT to answer them by docstrings, as teacher, and a smaller one for a few steps, as the initial student. The
student then writes docstrings, and is distilled on them by the reverse KL: once exactly, once by DIS, for the same
number of steps from the same weights. Writes results.json and report.md, and both students.

    accelerate launch examples/run_on_policy.py --output_dir runs/mine --teacher_model_name_or_path big \\
        --model_name_or_path small --train_files prompts.jsonl

distils models of your own on prompts of your own: a column ``prompt`` with texts or lists of messages, or
``messages``. The script takes all flags of DISOnPolicyConfig. Needs pip install "hf_dis[trl]".
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import sft_task
import torch
from accelerate import PartialState
from clm_task import build_student
from on_policy_task import prompts_of, quality
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_dis.integrations.on_policy import DISOnPolicyConfig, DISOnPolicyTrainer

METHODS = {"exact": "exact KD", "dis": "DIS"}
# For models that are made here; with --model_name_or_path the defaults are those of DISOnPolicyConfig.
FROM_SCRATCH = {
    "methods": list(METHODS),
    "max_steps": 50,
    "max_completion_length": 32,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "head_learning_rate": 4e-3,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "head_mode": "sampled",
    "num_shared_classes": 4096,
    "num_tails": 4,
    "row_sparse_head": True,
    "exact_warmup_steps": 0.1,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 20,
    "save_strategy": "no",
}
# Of the models' SFT.
SFT = {"max_length": 128, "packing": True, "assistant_only_loss": True, "per_device_train_batch_size": 4}


@dataclass
class OnPolicyExample:
    """Sources of models and prompts, and the methods to compare."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The initial student; a small Llama, trained by SFT first, if not given."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset of prompts or chats; signatures if there are no files either."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Files of prompts to train on: JSON, JSON lines, Parquet or CSV."}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Files to evaluate on; a twentieth of the prompts if not given."}
    )
    max_eval_prompts: int = field(default=128, metadata={"help": "Prompts to evaluate on, at most."})
    methods: list[str] = field(
        default_factory=lambda: ["dis"],
        metadata={"help": f"Methods to run, of {', '.join(METHODS)}; all of them without model_name_or_path."},
    )
    teacher_steps: int = field(default=160, metadata={"help": "Steps of the teacher's SFT."})
    student_steps: int = field(default=60, metadata={"help": "Steps of the initial student's SFT."})


def load_models(arguments: OnPolicyExample, args: DISOnPolicyConfig, chats):
    """The teacher, the initial student, and the tokenizer."""
    names = arguments.model_name_or_path, args.teacher_model_name_or_path
    name = names[0] or names[1]
    with args.main_process_first(desc="loading the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name) if name else sft_task.chat_tokenizer(32_000)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    made = {"_teacher": arguments.teacher_steps, "_student": arguments.student_steps}
    builders = {"_teacher": sft_task.build_teacher, "_student": build_student}
    models = []
    for folder, given in (("_teacher", names[1]), ("_student", names[0])):
        if given is None:
            print(f"Training {folder[1:]} by SFT for {made[folder]} steps ...", flush=True)
            model = builders[folder](len(tokenizer))
            models.append(sft_task.fine_tuned(model, folder, chats, tokenizer, made[folder], args, **SFT))
        else:
            models.append(AutoModelForCausalLM.from_pretrained(given))
    return (*models, tokenizer)


def distil(method: str, models, prompts, arguments: OnPolicyExample, args: DISOnPolicyConfig) -> dict:
    """Trains and evaluates one student; returns the record for results.json."""
    teacher, student, tokenizer = models
    args = copy.copy(args)
    if len(arguments.methods) > 1:
        args.output_dir = str(Path(args.output_dir) / method)
    if method == "exact":
        args.head_mode, args.row_sparse_head = "exact", False
    trainer = DISOnPolicyTrainer(
        copy.deepcopy(student), teacher, args, train_dataset=prompts["train"], processing_class=tokenizer
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    trainer.save_model()
    distiller, exact = trainer.distiller, trainer.distiller.mode == "exact"
    made = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "method": method,
        "vocab": distiller.num_classes,
        "sampled": distiller.num_classes if exact else distiller.sampler.columns + 1,  # and the token that was written
        "steps": trainer.state.global_step,
        "exact_steps": trainer.state.max_steps if exact else args.get_exact_warmup_steps(trainer.state.max_steps),
        "steps_per_second": trained["train_steps_per_second"],
        **measured(made, teacher, tokenizer, prompts, args),
    }


def measured(student, teacher, tokenizer, prompts, args: DISOnPolicyConfig) -> dict[str, float]:
    """The quality of what a student writes to the prompts held out."""
    given = args.max_completion_length, args.per_device_train_batch_size, args.seed
    return quality(student.to(args.device), teacher.to(args.device), tokenizer, prompts["validation"], *given)


def write_report(output: Path, records: list[dict], minutes: float) -> None:
    """Writes results.json, and report.md with a line per student; prints the report."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        f"# On-policy distillation of a model of {records[-1]['vocab']:,} tokens",
        "",
        f"{torch.get_num_threads()} threads; the whole run took {minutes:.1f} minutes. Each student writes to prompts "
        "held out of training, and is compared with the teacher on that text at temperature 1. p is the teacher, s "
        "the student. A step has the student's writing and the teacher's forward in it.",
        "",
        "| student | logits per token | steps | on all tokens | steps per second | KL(s, p) | KL(p, s) "
        "| teacher's log-likelihood per token | tokens of a completion |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        training = ["initial", "", "", "", ""]
        if "steps" in one:
            training = [METHODS[one["method"]], f"{one['sampled']:,}", one["steps"], one["exact_steps"]]
            training.append(f"{one['steps_per_second']:.2f}")
        found = [f"{one[name]:.3f}" for name in ("reverse_kl", "kl", "log_likelihood")]
        lines.append(f"| {' | '.join(map(str, [*training, *found]))} | {one['length']:.1f} |")
    (output / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    arguments, args = sft_task.parsed((OnPolicyExample, DISOnPolicyConfig), METHODS, FROM_SCRATCH)

    started = time.perf_counter()
    with args.main_process_first(desc="loading prompts"):
        chats = sft_task.load_chats(
            arguments.dataset_name, arguments.dataset_config_name, arguments.train_files, arguments.validation_files
        )
        prompts = prompts_of(chats)
    prompts["validation"] = prompts["validation"].take(min(arguments.max_eval_prompts, len(prompts["validation"])))
    models = load_models(arguments, args, chats)
    teacher, student, tokenizer = models
    records = [{"method": "initial", **measured(student, teacher, tokenizer, prompts, args)}]
    for method in (method for method in METHODS if method in arguments.methods):
        print(f"Distilling by {method!r} ...", flush=True)
        set_seed(args.seed)
        records.append(distil(method, models, prompts, arguments, args))
    if args.process_index == 0:
        write_report(Path(args.output_dir), records, (time.perf_counter() - started) / 60)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
