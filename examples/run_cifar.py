"""Distils a CIFAR-100 classifier with DISDistillationTrainer.

    accelerate launch examples/run_cifar.py --output_dir runs/cifar --data_dir cifar-100-python.tar.gz \\
        --head_mode sampled --num_sampled_classes 16 --num_shared_classes 0 --num_train_epochs 30

Without --teacher_model_name_or_path a teacher is trained first. The script takes all flags of DISConfig and
TrainingArguments. A hundred classes are too few for sampling to save time: the example shows correctness, and is a
start for your own script.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    RegNetConfig,
    RegNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.data import DataError, load_cifar100
from hf_dis.metrics import TopKAccuracy

MEAN, STD = [0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]


@dataclass
class CifarArguments:
    """Sources of data and models."""

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "The official archive, or a folder with the archive or its files; the Hub's copy if not given."
        },
    )
    verify_checksum: bool = field(
        default=True, metadata={"help": "Refuse any other than the official archive; see --no_verify_checksum."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A teacher of CIFAR-100's classes; trained first if not given."}
    )
    teacher_num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs of the teacher's training."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The initial student; a small RegNet with random weights if not given."}
    )


class LabelTrainer(Trainer):
    """The stock Trainer for models that take ``num_items_in_batch`` and ignore it.

    In the stock Trainer their loss would count once for each process and accumulation step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def load_splits(arguments: CifarArguments, args: TrainingArguments):
    """The augmented training split and the test split, with ``pixel_values`` and ``labels``; the class names."""
    with args.main_process_first(desc="loading CIFAR-100"):
        splits = load_cifar100(arguments.data_dir, verify_checksum=arguments.verify_checksum)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    augmented = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), to_tensor])

    def yielding(transform):
        return lambda batch: {
            "pixel_values": [transform(image.convert("RGB")) for image in batch["img"]],
            "labels": batch["fine_label"],
        }

    names = splits["train"].features["fine_label"].names
    return (
        splits["train"].with_transform(yielding(augmented)),
        splits["test"].with_transform(yielding(to_tensor)),
        names,
    )


def build_regnet(names: list[str], hidden_sizes: list[int], depths: list[int], layer_type: str):
    """A RegNet for 32x32 images, with random weights."""
    config = RegNetConfig(
        embedding_size=32,
        hidden_sizes=hidden_sizes,
        depths=depths,
        groups_width=32,
        layer_type=layer_type,
        downsample_in_first_stage=False,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return RegNetForImageClassification(config)


def train_teacher(arguments: CifarArguments, args: DISConfig, train_dataset, names) -> RegNetForImageClassification:
    """Trains a teacher on the labels with the batch size, precision and device of the student's run."""
    teacher_args = TrainingArguments(
        output_dir=str(Path(args.output_dir) / "_teacher"),  # push_to_hub leaves out names that start with _
        num_train_epochs=arguments.teacher_num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=1e-3,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        bf16=args.bf16,
        fp16=args.fp16,
        use_cpu=args.use_cpu,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_strategy="no",
        report_to=args.report_to,
        disable_tqdm=args.disable_tqdm,
        dataloader_num_workers=args.dataloader_num_workers,
        remove_unused_columns=False,
    )
    teacher = build_regnet(names, hidden_sizes=[64, 128, 256], depths=[2, 3, 2], layer_type="y")
    trainer = LabelTrainer(model=teacher, args=teacher_args, train_dataset=train_dataset)
    trainer.train()
    trainer.save_model()
    return trainer.accelerator.unwrap_model(trainer.model)


def main() -> None:
    parser = HfArgumentParser((CifarArguments, DISConfig))
    arguments, args = parser.parse_args_into_dataclasses()
    args.remove_unused_columns = False  # the splits' transforms make the columns
    try:
        train_dataset, eval_dataset, names = load_splits(arguments, args)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None

    set_seed(args.seed)
    teacher = arguments.teacher_model_name_or_path or train_teacher(arguments, args, train_dataset, names)
    set_seed(args.seed)
    if arguments.model_name_or_path:
        student = AutoModelForImageClassification.from_pretrained(
            arguments.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True
        )
    else:
        student = build_regnet(names, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="x")
    trainer = DISDistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, do_normalize=True
        ),
        compute_metrics=lambda predicted: TopKAccuracy().compute(
            predictions=predicted.predictions, references=predicted.label_ids
        ),
        preprocess_logits_for_metrics=lambda logits, labels: logits.topk(5).indices,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
