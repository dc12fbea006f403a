"""Distils a person re-identification model: the classes are identities, the features are the input of the head.

    accelerate launch examples/run_market1501.py --output_dir runs/market --data_dir Market-1501-v15.09.15.zip \\
        --teacher_backbone microsoft/resnet-50 --model_name_or_path microsoft/resnet-18

Offline and without the dataset, on characters in the same format:

    accelerate launch examples/run_market1501.py --output_dir runs/glyph-market/dis \\
        --glyph_dir runs/glyph-market/data --head_mode sampled --num_sampled_classes 64 --num_shared_classes 0

Evaluation ranks the gallery for each query and reports CMC and mAP. Without --teacher_model_name_or_path a teacher is
trained first. The script takes all flags of DISConfig and TrainingArguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from run_cifar import LabelTrainer
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.data import DataError, load_market1501, write_glyph_market
from hf_dis.metrics import reid_scores

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as most backbones expect
PERSON_SIZE, GLYPH_SIZE = [256, 128], [32, 32]


@dataclass
class MarketArguments:
    """Sources of data and models."""

    data_dir: str | None = field(
        default=None, metadata={"help": "The official archive, or a folder with the archive or its extracted folder."}
    )
    glyph_dir: str | None = field(
        default=None,
        metadata={
            "help": "In place of data_dir: a folder of characters in the same format, written first if missing."
        },
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": f"Height and width; {PERSON_SIZE} if not given, {GLYPH_SIZE} for glyphs.", "nargs": 2},
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A teacher of the training identities; trained first if not given."}
    )
    teacher_backbone: str | None = field(
        default=None, metadata={"help": "An image classifier, the initial teacher; a small ResNet if not given."}
    )
    teacher_num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs of the teacher's training."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the teacher's training."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "An image classifier, the initial student; a small ResNet if not given."},
    )


class ReIDTrainer(DISDistillationTrainer):
    """Evaluates the student by retrieval. ``eval_dataset`` is a dict with the splits ``query`` and ``gallery``."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        splits = eval_dataset or self.eval_dataset
        query, gallery = (self.extract_features(splits[name]) for name in ("query", "gallery"))
        ids = [splits[name].with_format(None)[key][:] for key in ("pid", "camid") for name in ("query", "gallery")]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in reid_scores(query, gallery, *ids).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def load_splits(arguments: MarketArguments, args: TrainingArguments, size: list[int]):
    """The splits with ``pixel_values`` and, in ``train``, ``labels``; the names of the training identities."""
    if (arguments.data_dir is None) == (arguments.glyph_dir is None):
        raise DataError(
            "give either --data_dir, the path of Market-1501-v15.09.15.zip, or --glyph_dir runs/glyph-market/data to "
            "generate a dataset of characters in the same format and try the example without a download"
        )
    with args.main_process_first(desc="loading the images"):
        if arguments.glyph_dir and not Path(arguments.glyph_dir).exists():
            write_glyph_market(arguments.glyph_dir)
        splits = load_market1501(arguments.data_dir or arguments.glyph_dir)
    # A mirrored character, or a character without a part, may be a different character. A mirrored person is the same.
    often = 0.0 if arguments.glyph_dir else 0.5
    resize, erase = v2.Resize(size), v2.RandomErasing(often)
    augment = v2.Compose([resize, v2.RandomHorizontalFlip(often), v2.RandomCrop(size, padding=size[1] // 12)])
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def stacked(images):
        return normalise(torch.stack([v2.functional.pil_to_tensor(image) for image in images]))

    def training(batch):
        pixels = stacked([augment(image) for image in batch["image"]])
        return {"pixel_values": [erase(image) for image in pixels], "labels": batch["label"]}

    def testing(batch):  # no model was trained on these identities: no labels
        return {"pixel_values": list(stacked([resize(image) for image in batch["image"]]))}

    names = splits["train"].features["label"].names
    test = {name: splits[name].with_transform(testing) for name in ("query", "gallery")}
    return splits["train"].with_transform(training), test, names


def build_model(backbone: str | None, names: list[str], hidden_sizes: list[int]) -> PreTrainedModel:
    """``backbone`` with a new head for the identities, or a small ResNet with random weights."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if backbone is not None:
        return AutoModelForImageClassification.from_pretrained(backbone, ignore_mismatched_sizes=True, **labels)
    depths = [1] * len(hidden_sizes)
    config = ResNetConfig(embedding_size=16, hidden_sizes=hidden_sizes, depths=depths, layer_type="basic", **labels)
    return ResNetForImageClassification(config)


def train_teacher(arguments: MarketArguments, args: DISConfig, train_dataset, names: list[str]) -> PreTrainedModel:
    """Trains a teacher on the labels with the batch size, precision and device of the student's run."""
    teacher_args = TrainingArguments(
        output_dir=str(Path(args.output_dir) / "_teacher"),  # push_to_hub leaves out names that start with _
        num_train_epochs=arguments.teacher_num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=arguments.teacher_learning_rate,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
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
    teacher = build_model(arguments.teacher_backbone, names, hidden_sizes=[32, 64, 128])
    trainer = LabelTrainer(model=teacher, args=teacher_args, train_dataset=train_dataset)
    trainer.train()
    trainer.save_model()
    return trainer.accelerator.unwrap_model(trainer.model)


def main() -> None:
    parser = HfArgumentParser((MarketArguments, DISConfig))
    arguments, args = parser.parse_args_into_dataclasses()
    args.remove_unused_columns = False  # the splits' transforms make the columns
    size = arguments.image_size or (GLYPH_SIZE if arguments.glyph_dir else PERSON_SIZE)
    try:
        train_dataset, test, names = load_splits(arguments, args, size)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None

    set_seed(args.seed)
    teacher = arguments.teacher_model_name_or_path or train_teacher(arguments, args, train_dataset, names)
    set_seed(args.seed)
    trainer = ReIDTrainer(
        model=build_model(arguments.model_name_or_path, names, hidden_sizes=[16, 32, 64]),
        teacher_model=teacher,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=test,
        processing_class=ViTImageProcessor(
            size={"height": size[0], "width": size[1]}, image_mean=MEAN, image_std=STD, do_normalize=True
        ),
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
