"""Students whose head has moments in float32, or in bfloat16 that is rounded at random, and the bytes of each row.

    python benchmarks/moments.py --json moments.jsonl --seeds 0 1

The task is that of examples/run_next_item.py with smaller sizes: users simulated by a hidden Markov model, a teacher
trained on labels, and students of DIS with its defaults. Students of a seed have the same first weights and the same
batches. Bytes are those of a row of the head: the weight, the moments, and the counters of the optimizer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean

from common import header, machine, parse, parser, row, write
from transformers import LlamaForCausalLM, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import item_data
import item_task
import run_next_item
from students import by_setting

from hf_dis import DISConfig, DISDistillationTrainer

MOMENTS = ("float32", "bfloat16")
LENGTH, TEACHER_WIDTH, LAYERS, EVAL_WINDOWS = 50, 64, 1, 256


def config(folder: str, use_cpu: bool, **settings) -> DISConfig:
    """The settings of run_next_item.py, of which some are replaced."""
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": use_cpu, "logging_strategy": "no"}
    return DISConfig(output_dir=folder, **{**run_next_item.DEFAULTS, **quiet, **settings})


def row_bytes(trainer: DISDistillationTrainer) -> dict[str, int]:
    """Bytes of a row of the head: its weight, its moments, and the counters of the optimizer."""
    weight = trainer.head.module.weight
    state = {name: value for name, value in trainer.optimizer.state[weight].items() if hasattr(value, "nbytes")}
    moments = sum(value.nbytes for name, value in state.items() if name.startswith("exp_avg"))
    found = {"weight": weight.nbytes, "moments": moments, "counters": sum(v.nbytes for v in state.values()) - moments}
    return {name: number // len(weight) for name, number in found.items()}


def student(
    moments: str, seed: int, teacher: LlamaForCausalLM, data: item_data.Interactions, args: DISConfig, width: int
) -> dict:
    """Trains and measures one student."""
    set_seed(seed)
    windows = data.training(LENGTH)
    curve = item_task.RankingCurve(data.held_out("validation", LENGTH).take(64), args.max_steps)
    model = item_task.build(data.num_classes, width, LAYERS, seed=1 + seed)
    trainer = item_task.student_trainer("dis", model, teacher, data, windows, args, curve)
    trainer.train()
    metrics = trainer.evaluate(windows.take(EVAL_WINDOWS))
    bytes_of = {f"{name}_bytes": number for name, number in row_bytes(trainer).items()}
    scores = item_task.scores(trainer.model, data.held_out("test", LENGTH))
    return {"moments": moments, "width": width, "seed": seed, "kl": metrics["eval_kl"], **scores, **bytes_of}


def print_table(records: list[dict]) -> None:
    """Means over seeds."""
    sizes = ("weight, bytes", "moments, bytes", "counters, bytes")
    print(header("moments", "features", *sizes, "seeds", "KL", "NDCG@10"))
    for (moments, width), runs in by_setting(records, ("moments", "width")).items():
        found = list(runs.values())
        sizes = [found[0][f"{name}_bytes"] for name in ("weight", "moments", "counters")]
        kl, ndcg = (mean(one[name] for one in found) for name in ("kl", "ndcg10"))
        print(row(moments, width, *sizes, len(found), f"{kl:.4f}", f"{ndcg:.4f}"))


def main() -> None:
    """Runs the script."""
    made = parser(__doc__)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    made.add_argument("--num_items", type=int, default=4000, help="items of the catalogue")
    made.add_argument("--users", type=int, default=3000)
    made.add_argument("--width", type=int, default=32, help="features of the students")
    made.add_argument("--steps", type=int, default=150, help="of each student")
    made.add_argument("--teacher_steps", type=int, default=150)
    given = parse(made)
    logging.set_verbosity_error()
    print(machine(given.device), flush=True)
    data, use_cpu = item_data.simulate(given.num_items, given.users), given.device.type == "cpu"
    records = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = item_task.build(data.num_classes, TEACHER_WIDTH, LAYERS, seed=0)
        args = config(folder, use_cpu)
        settings = {**run_next_item.TEACHER, "max_steps": given.teacher_steps}
        teacher = item_task.train_teacher(teacher, data, LENGTH, args, **settings)
        for seed in given.seeds:
            for moments in MOMENTS:
                args = config(folder, use_cpu, seed=seed, max_steps=given.steps, moment_dtype=moments)
                records.append(student(moments, seed, teacher, data, args, given.width))
                print(records[-1], flush=True)
    write(records, given.json, given.device)
    print_table(records)


if __name__ == "__main__":
    main()
