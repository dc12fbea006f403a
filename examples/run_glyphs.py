"""Distils a recogniser of 3,375 characters five ways and compares the students. Offline, some minutes on two cores.

    accelerate launch --num_processes 1 examples/run_glyphs.py --output_dir runs/glyphs

Teacher and students are small ResNets; training and test typefaces are disjoint. All students start from the same
weights and see the same number of images. Each method runs at its best head learning rate in the sweep of
docs/how-it-works.md. Writes results.json, report.md, SVG plots, the models, and the images of demo/app.py to
--output_dir.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import glyph_plots
from accelerate import PartialState
from glyph_task import (
    GlyphImages,
    build_student,
    build_teacher,
    load_task,
    load_teacher,
    name_classes,
    student_trainer,
    train_teacher,
)
from head_step import time_head_steps
from PIL import Image
from transformers import HfArgumentParser, ResNetForImageClassification, TrainerCallback, set_seed

from hf_dis import DISDistillationTrainer
from hf_dis.report.plots import ProposalSnapshot, plot_proposal

# The settings of each method; "head_rate" is the head's learning rate as a multiple of the body's.
METHODS = {
    "hard_labels": {"head_rate": 16, "head_mode": "exact", "hard_label_weight": 1.0},
    "exact": {"head_rate": 20, "head_mode": "exact"},
    "dis": {"head_rate": 20, "rank_depth": 3375},
    # Fixed teacher importance sampling, from the teacher's whole distribution with replacement.
    "ftis": {"head_rate": 20, "proposal": "teacher", "design": "replacement", "rank_depth": 3375},
    "topk": {"head_rate": 12, "proposal": "topk"},
}
# Characters of the test set that demo/app.py shows.
EXAMPLES = "AQRagk258&@?éñßøΔΩλπЖя→∑"


@dataclass
class GlyphArguments:
    """The arguments of the demo."""

    output_dir: str = field(default="runs/glyphs", metadata={"help": "Folder of results, report and plots."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Methods to run, of {', '.join(METHODS)}."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Path of a teacher saved by an earlier run; trained first if not given."}
    )
    teacher_epochs: float = field(default=8.0, metadata={"help": "Epochs of the teacher's training."})
    epochs: float = field(default=4.0, metadata={"help": "Epochs of each student's training."})
    num_sampled_classes: int = field(
        default=128, metadata={"help": "K: classes that each sampling method samples per item, out of 3,375."}
    )
    num_shared_classes: int = field(default=0, metadata={"help": "K_t: classes of a shared tail; 0 as in the paper."})
    num_tails: int = field(
        default=1, metadata={"help": "G: shared tails of a batch, where num_shared_classes is above 0."}
    )
    head_rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Run every method at each of these multiples of the head learning rate (the sweep)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of data order, augmentation and sampling."})
    report_to: str = field(default="none", metadata={"help": "A logger of transformers, such as tensorboard."})


class ProposalRecorder(TrainerCallback):
    """Keeps the proposal over ranks at a few steps, for the plot."""

    STEPS = (10, 100, 400)

    def __init__(self):
        self.snapshots: list[ProposalSnapshot] = []
        self.trainer: DISDistillationTrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.STEPS:
            ranks = self.trainer.distiller.sampler.proposal.ranks
            self.snapshots.append(ProposalSnapshot.of(ranks, state.global_step))


def distil(method: str, head_rate: float, teacher, task, arguments: GlyphArguments) -> tuple[dict, ProposalRecorder]:
    """Trains one student; returns the record for results.json, and the recorder of the proposal."""
    trainer = student_trainer(
        teacher,
        task,
        output_dir=str(Path(arguments.output_dir) / method),
        num_train_epochs=arguments.epochs,
        seed=arguments.seed,
        report_to=arguments.report_to,
        num_sampled_classes=arguments.num_sampled_classes,
        num_shared_classes=arguments.num_shared_classes,
        num_tails=arguments.num_tails,
        **{**METHODS[method], "head_rate": head_rate},
    )
    recorder = ProposalRecorder()
    recorder.trainer = trainer
    if method == "dis":
        trainer.add_callback(recorder)
    set_seed(arguments.seed)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    metrics = trainer.evaluate()
    trainer.save_model()
    distiller = trainer.distiller
    record = {
        "method": method,
        "classes": distiller.num_classes,
        "sampled": distiller.num_classes if distiller.mode == "exact" else distiller.sampler.columns,
        "head_rate": head_rate,
        "top1": round(metrics["eval_top1"], 4),
        "top5": round(metrics["eval_top5"], 4),
        "kl": round(metrics["eval_kl"], 4),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(record), flush=True)
    return record, recorder


def save_examples(folder: Path, dataset: GlyphImages, names: list[str]) -> None:
    """Saves images of some characters for demo/app.py, named after the characters."""
    folder.mkdir(exist_ok=True)
    for number, character in enumerate(EXAMPLES):
        name = f"U+{ord(character):04X}"
        place = dataset.labels.tolist().index(names.index(name))
        Image.fromarray(dataset.images[place, 0].numpy()).save(folder / f"{number:02}-{name}.png")


def main() -> None:
    (arguments,) = HfArgumentParser(GlyphArguments).parse_args_into_dataclasses()
    unknown = set(arguments.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}: choose from {', '.join(METHODS)}")
    started = time.perf_counter()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    print("Rendering the glyphs (once; cached afterwards) ...", flush=True)
    task = load_task()
    train_dataset, test_dataset, names = task
    print(f"{len(train_dataset)} training and {len(test_dataset)} test images of {len(names)} characters", flush=True)

    set_seed(arguments.seed)
    if arguments.teacher:
        teacher = load_teacher(arguments.teacher)
        name_classes(teacher, names)
    else:
        print(f"Training the teacher for {arguments.teacher_epochs:g} epochs ...", flush=True)
        teacher = build_teacher(len(names))
        name_classes(teacher, names)
        train_teacher(teacher, train_dataset, arguments.teacher_epochs, str(output / "teacher"))
    teacher.save_pretrained(output / "teacher")
    save_examples(output / "examples", test_dataset, names)
    millions = {"teacher": teacher.num_parameters() / 1e6, "student": build_student(len(names)).num_parameters() / 1e6}
    print(f"Teacher: {millions['teacher']:.2f} M parameters; students: {millions['student']:.2f} M", flush=True)

    records, proposals = [], []
    for method in arguments.methods:
        for head_rate in arguments.head_rates or [METHODS[method]["head_rate"]]:
            print(f"Distilling by {method!r}, head learning rate x{head_rate:g} ...", flush=True)
            record, recorder = distil(method, head_rate, teacher, task, arguments)
            records.append(record)
            proposals += recorder.snapshots
    (output / "results.json").write_text(json.dumps(records, indent=2) + "\n")
    if arguments.head_rates:
        return

    print("Timing one head step at 100,000 classes ...", flush=True)
    steps = time_head_steps(num_classes=100_000)
    minutes = (time.perf_counter() - started) / 60
    glyph_plots.write_report(output, records, steps, millions, minutes)
    glyph_plots.plot_quality(output / "quality.svg", records)
    if proposals:
        plot_proposal(output / "proposal.svg", proposals)
    if "dis" in arguments.methods:
        student = ResNetForImageClassification.from_pretrained(output / "dis")
        glyph_plots.plot_confusions(output / "confusions.svg", student, test_dataset, names)
    print((output / "report.md").read_text())


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
