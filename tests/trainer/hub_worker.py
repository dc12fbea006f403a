"""Publishes from processes of their own to a local server, for test_publishing: ``hub_worker.py MODE FOLDER``."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import urllib.request
from pathlib import Path

import torch
from archives import write_cifar100_archive
from tiny_models import images, labelled_images, vit

from hf_dis import DISConfig, DISDistillationTrainer, DISReportCallback


def make(folder: Path, name: str, teacher: str | None = None, **keywords) -> DISDistillationTrainer:
    args = DISConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        probe_steps=1,
        head_mode="sampled",
        num_sampled_classes=6,
        num_shared_classes=8,
        rank_depth=10,
        **{"save_strategy": "no", **keywords},
    )
    return DISDistillationTrainer(
        model=vit(40),
        teacher_model=teacher or str(folder / "teacher"),
        args=args,
        train_dataset=labelled_images(16, 40),
        eval_dataset=labelled_images(8, 40),
    )


def failure(do, *args, **kwargs) -> str:
    """The message of the error that is expected."""
    try:
        do(*args, **kwargs)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nothing failed")


def server_fails(at: str) -> None:
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/control?fail={at}").read()


def publish(folder: Path) -> dict:
    time.sleep = lambda seconds: None  # the client waits between its attempts
    trainer = make(folder, "student", save_strategy="steps", save_steps=1)
    trainer.add_callback(DISReportCallback(trainer))
    trainer.train()
    trainer.evaluate()
    trainer.distiller.teacher.model.save_pretrained(folder / "student" / "_teacher")
    report = {}
    for at in ("lfs", "commit"):
        server_fails(at)
        report[at] = failure(trainer.push_to_hub)
    server_fails("")
    report["metadata"] = failure(trainer.push_to_hub, license="none-of-the-hubs")
    logits = trainer.model.eval()(images(4)).logits.detach()
    saved = type(trainer.model).from_pretrained(folder / "student").eval()
    report["intact"] = torch.equal(saved(images(4)).logits, logits)
    torch.save({"pixel_values": images(4), "logits": logits}, folder / "published.pt")
    report["commit url"] = trainer.push_to_hub(dataset="Glyphs", license="apache-2.0").commit_url

    every_save = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True}
    make(folder, "at-checkpoints", **every_save).train()
    server_fails("commit")
    make(folder, "lost-in-the-background", **every_save).train()
    server_fails("")
    named = {"push_to_hub": True, "hub_model_id": "an-org/named"}
    make(folder, "at-the-end", teacher="tester/teacher", **named).save_model()
    return report


def refused(folder: Path) -> dict:
    trainer = make(folder, "kept")
    trainer.train()
    report = {"no token": failure(trainer.push_to_hub)}
    report["no token at the start"] = failure(make, folder, "never", push_to_hub=True)
    from transformers.utils.hub import hf_api

    hf_api().endpoint = "http://127.0.0.1:9"
    report["no network"] = failure(trainer.push_to_hub)
    return report


def cifar(folder: Path) -> dict:
    """Runs the example as it is; what the student that it trained answers is kept when it publishes it."""
    push = DISDistillationTrainer.push_to_hub

    def push_and_keep(trainer: DISDistillationTrainer, **commit) -> None:
        pixel_values = torch.randn(4, 3, 32, 32)
        logits = trainer.model.eval()(pixel_values).logits.detach()
        torch.save({"pixel_values": pixel_values, "logits": logits}, folder / "cifar.pt")
        push(trainer, **commit)

    DISDistillationTrainer.push_to_hub = push_and_keep
    script = Path(__file__).parents[2] / "examples" / "run_cifar.py"
    data = ["--data_dir", str(write_cifar100_archive(folder, train=96, test=40)), "--no_verify_checksum"]
    method = ["--head_mode", "sampled", "--num_sampled_classes", "8", "--probe_steps", "2"]
    length = ["--teacher_num_train_epochs", "1", "--max_steps", "3", "--logging_steps", "1", "--save_steps", "2"]
    hub = ["--push_to_hub", "true", "--hub_model_id", "tester/cifar"]
    sys.argv = [str(script), "--output_dir", str(folder / "cifar"), "--use_cpu", *data, *method, *length, *hub]
    runpy.run_path(str(script), run_name="__main__")
    return {"left": sorted(path.name for path in (folder / "cifar").iterdir())}


if __name__ == "__main__":
    mode, folder = {"publish": publish, "refused": refused, "cifar": cifar}[sys.argv[1]], Path(sys.argv[2])
    (folder / f"{sys.argv[1]}.json").write_text(json.dumps(mode(folder)))
