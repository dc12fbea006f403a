"""Distils a language model with DISDistillationTrainer: by sampled tokens, by all tokens, or both to compare.

    accelerate launch examples/run_clm.py --output_dir runs/clm

Without models and data of your own the script makes everything offline. The data is the text of Python's standard
library, with a tokenizer of 32,000 tokens. The teacher is a small Llama, trained for some minutes. Two smaller
students are distilled, one exactly and one by DIS. Both start from the same weights and get the same batches. The
first tenth of DIS's steps computes all tokens. A third student is distilled exactly for the time that DIS took.
Writes results.json, report.md and a plot.

    accelerate launch examples/run_clm.py --output_dir runs/mine --teacher_model_name_or_path big \\
        --model_name_or_path small --train_files train.txt --num_train_epochs 1 --learning_rate 1e-4 --row_sparse_head

distils a model of your own. The script takes all flags of DISConfig and TrainingArguments. --use_peft trains LoRA
adapters, and --mlm is for masked language models. More in docs/language-models.md.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import clm_plots
import clm_task
from accelerate import PartialState
from datasets import DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_dis import DISConfig, DISDistillationTrainer

METHODS = ("exact", "dis", "exact_in_time")
# For students with random weights; with --model_name_or_path the defaults are those of DISConfig.
FROM_SCRATCH = {
    "methods": list(METHODS),
    "max_steps": 180,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
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
    "probe_steps": 60,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "logging_steps": 30,
    "save_strategy": "no",
}


@dataclass
class ClmArguments:
    """Sources of models and data, and the methods to compare."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher; a small Llama, trained first, if not given."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The initial student; a small Llama with random weights if not given."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset of texts; Python's standard library if there are no files either."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_files: list[str] | None = field(default=None, metadata={"help": "Text files to train on."})
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Text files to evaluate on; a twentieth of the texts if not given."}
    )
    text_column: str = field(default="text", metadata={"help": "The column with the texts."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a training sequence."})
    max_eval_blocks: int = field(default=32, metadata={"help": "Sequences to evaluate on, at most."})
    methods: list[str] = field(
        default_factory=lambda: ["dis"],
        metadata={"help": f"Methods to run, of {', '.join(METHODS)}; all of them without model_name_or_path."},
    )
    teacher_steps: int = field(default=360, metadata={"help": "Steps of the teacher's training."})
    mlm: bool = field(default=False, metadata={"help": "Masked language models in place of causal ones."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters of the student only."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})


class Stopwatch(TrainerCallback):
    """Records the results of each evaluation with the steps and seconds of training before it."""

    def __init__(self):
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._started

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        quality = {"kl": metrics["eval_kl"], "perplexity": math.exp(metrics["eval_ce_loss"])}
        self.curve.append({"step": state.global_step, "seconds": self.seconds, **quality})


def load_models(arguments: ClmArguments, args: DISConfig, texts: DatasetDict):
    """The teacher or its name, a function that makes a student, the tokenizer, and the tokenized texts."""
    from_hub = AutoModelForMaskedLM if arguments.mlm else AutoModelForCausalLM
    name = arguments.model_name_or_path or arguments.teacher_model_name_or_path
    with args.main_process_first(desc="tokenizing"):
        tokenizer = AutoTokenizer.from_pretrained(name) if name else clm_task.train_tokenizer(texts["train"], 32_000)
        splits = clm_task.tokenized(texts, tokenizer, arguments.block_size)
    splits["validation"] = splits["validation"].take(min(arguments.max_eval_blocks, len(splits["validation"])))

    teacher = arguments.teacher_model_name_or_path
    if teacher is None:
        print(f"Training the teacher for {arguments.teacher_steps} steps ...", flush=True)
        teacher = clm_task.train_teacher(splits["train"], tokenizer, arguments.teacher_steps, args)

    def student():
        if arguments.model_name_or_path:
            model = from_hub.from_pretrained(arguments.model_name_or_path)
        else:
            model = clm_task.build_student(len(tokenizer))
        if arguments.use_peft:
            # Imported here: without --use_peft the script runs without peft.
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules="all-linear")
            model = get_peft_model(model, lora)
        return model

    return teacher, student, tokenizer, splits


def distil(method: str, steps: int, models, arguments: ClmArguments, args: DISConfig) -> dict:
    """Trains and evaluates one student; returns the record for results.json."""
    teacher, student, tokenizer, splits = models
    args = copy.copy(args)
    args.max_steps = steps
    if len(arguments.methods) > 1:
        args.output_dir = str(Path(args.output_dir) / method)
    if method != "dis":
        args.head_mode, args.row_sparse_head = "exact", False
    set_seed(args.seed)
    collator = default_data_collator
    if arguments.mlm:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=arguments.mlm_probability)
    stopwatch = Stopwatch()
    trainer = DISDistillationTrainer(
        model=student(),
        teacher_model=teacher,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=[stopwatch],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    distiller, exact = trainer.distiller, trainer.distiller.mode == "exact"
    probed = [log["probe/relative_error"] for log in trainer.state.log_history if "probe/relative_error" in log]
    return {
        "method": method,
        "vocab": distiller.num_classes,
        "sampled": distiller.num_classes if exact else distiller.sampler.columns,
        "exact_steps": trainer.state.max_steps if exact else args.get_exact_warmup_steps(trainer.state.max_steps),
        "learning_rate": args.learning_rate,
        "head_learning_rate": args.head_learning_rate or args.learning_rate,
        "gradient_error": 0.0 if exact else probed[-1] if probed else None,
        "steps": trainer.state.global_step,
        **{name: value for name, value in stopwatch.curve[-1].items() if name != "step"},
        "curve": stopwatch.curve,
    }


def main() -> None:
    parser = HfArgumentParser((ClmArguments, DISConfig))
    given = parser.parse_args()
    if given.mlm and not (given.teacher_model_name_or_path and given.model_name_or_path):
        parser.error("--mlm needs --teacher_model_name_or_path and --model_name_or_path: only causal models are made")
    unknown = set(given.methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}: choose from {', '.join(METHODS)}")
    if "exact_in_time" in given.methods and set(given.methods) != set(METHODS):
        parser.error("exact_in_time needs the time of dis and the speed of exact: name all three in --methods")
    if given.model_name_or_path is None:
        parser.set_defaults(**FROM_SCRATCH)
    arguments, args = parser.parse_args_into_dataclasses()

    started = time.perf_counter()
    with args.main_process_first(desc="loading texts"):
        texts = clm_task.load_texts(
            arguments.dataset_name,
            arguments.dataset_config_name,
            arguments.train_files,
            arguments.validation_files,
            arguments.text_column,
        )
    models = load_models(arguments, args, texts)
    records: dict[str, dict] = {}
    for method in (method for method in METHODS if method in arguments.methods):
        steps = args.max_steps
        if method == "exact_in_time":
            exact, dis = records["exact"], records["dis"]
            steps = max(1, round(exact["steps"] * dis["seconds"] / exact["seconds"]))
        print(f"Distilling by {method!r} ...", flush=True)
        records[method] = distil(method, steps, models, arguments, args)
    if args.process_index == 0:
        minutes = (time.perf_counter() - started) / 60
        clm_plots.write_report(Path(args.output_dir), list(records.values()), minutes)
        clm_plots.plot_curves(Path(args.output_dir) / "curves.svg", list(records.values()))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
