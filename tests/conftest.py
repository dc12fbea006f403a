import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def verbosity_kept():
    """A script that a test calls sets the level of transformers' logs for the whole process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def warnings_told_anew():
    """Repeats in the next test the warnings that are given once."""
    logging.warning_once.cache_clear()


@pytest.fixture
def dense_kd():
    """τ² KL(p ‖ s) of each item straight from the definition: float64, dense, differentiable."""

    def kd(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        student = (logits.double() / temperature).exp()
        student = student / student.sum(1, keepdim=True)
        teacher = (teacher_logits.double() / temperature).exp()
        teacher = teacher / teacher.sum(1, keepdim=True)
        return temperature**2 * (teacher * (teacher.log() - student.log())).sum(1)

    return kd


@pytest.fixture
def dense_ce():
    """-log softmax(z)_y of each item straight from the definition: float64, dense, differentiable."""

    def ce(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.double()
        return logits.exp().sum(1).log() - logits[torch.arange(len(logits)), labels]

    return ce


@pytest.fixture
def make_trainer(tmp_path):
    """Builds a trainer for 8x8 images of 40 classes; keywords are fields of DISConfig, or arguments of the trainer."""
    from tiny_models import labelled_images, vit

    from hf_dis import DISConfig, DISDistillationTrainer

    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "head_mode": "sampled",
        "num_sampled_classes": 6,
        "num_shared_classes": 8,
        "rank_depth": 10,
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}

    def make(student=None, teacher=None, **keywords):
        given = {name: keywords.pop(name) for name in list(keywords) if name not in DISConfig.__dataclass_fields__}
        args = DISConfig(**{"output_dir": str(tmp_path / "out"), **quiet, **defaults, **keywords})
        if "model_init" not in given:
            given["model"] = vit(40, seed=0) if student is None else student
        given.setdefault("train_dataset", labelled_images(32, 40))
        if teacher is None and "teacher_cache" not in given:
            teacher = vit(40, seed=1, spread=30)
        return DISDistillationTrainer(teacher_model=teacher, args=args, **given)

    return make
