"""Runs of test_text_ddp in one process and, forked by launch.py, in two: language models, partly supervised."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import peft
import torch
from accelerate import PartialState
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import gpt2, labelled_tokens, llama

from hf_dis import DISConfig, DISDistillationTrainer

V, ITEMS = 40, 4
UNSUPERVISED = [1, 2]  # batches: of the second process in the first step, of the first process in the second
SGD = {"optim": "sgd", "learning_rate": 0.5}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.02, "adam_epsilon": 1e-3, "row_sparse_head": True}


def with_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


RUNS = {
    "exact": (llama, {"head_mode": "exact", **SGD}),
    "sampled": (llama, SGD),
    "tied": (gpt2, SGD),
    "row-sparse": (llama, ADAMW),
    "row-sparse, tied": (gpt2, ADAMW),
    "adapter on the head": (lambda vocab_size: with_adapter(llama(vocab_size)), SGD),
    "row-sparse adapter": (lambda vocab_size: with_adapter(llama(vocab_size)), ADAMW),
}


def items() -> list[dict]:
    data = labelled_tokens(6 * ITEMS, V)
    for batch in UNSUPERVISED:
        for item in data[batch * ITEMS : (batch + 1) * ITEMS]:
            item["labels"][:] = -100
    return data


def trained(name: str, output_dir: Path) -> dict:
    build, settings = RUNS[name]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = DISConfig(
        output_dir=str(output_dir / name),
        per_device_train_batch_size=ITEMS,
        gradient_accumulation_steps=2 // processes,
        max_steps=3,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 0, "proposal": "topk", **settings},
    )
    trainer = DISDistillationTrainer(build(V), llama(V, seed=1, spread=30), args, train_dataset=items())
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    return {
        "student": {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()},
        "losses": [log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log],
    }


def run(output_dir: Path) -> None:
    """Trains each of RUNS; every process writes its results to ``output_dir``."""
    results = {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
    results |= {name: trained(name, output_dir) for name in RUNS}
    torch.save(results, output_dir / f"rank_{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
