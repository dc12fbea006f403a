"""Trains with worker processes until it is interrupted: started by test_leaks, which sends Ctrl-C."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import labelled_images, patched_modules, vit
from transformers import TrainerCallback

from hf_dis import DISConfig, DISDistillationTrainer


class Announce(TrainerCallback):
    """Prints the number of worker processes once training is under way."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            print("training", len(multiprocessing.active_children()), flush=True)


def main(output_dir: str) -> None:
    # A shell starts background jobs with interrupts ignored, and Python leaves an inherited choice as it is.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = DISConfig(
        output_dir=output_dir,
        max_steps=100_000,
        per_device_train_batch_size=4,
        dataloader_num_workers=2,
        save_strategy="no",
        head_mode="sampled",
        num_sampled_classes=6,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = labelled_images(64, 40) * 100
    trainer = DISDistillationTrainer(vit(40), vit(40, seed=1), args, train_dataset=data, callbacks=[Announce()])
    try:
        trainer.train()
    except KeyboardInterrupt:
        print("patched", patched_modules(trainer.model), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
