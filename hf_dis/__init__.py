"""hf_dis: knowledge distillation for huge output layers (Dynamic Importance Sampling, arXiv 1812.00914)."""

from .callbacks import DISReportCallback
from .config import DISConfig
from .losses import DISLoss
from .optim import RowSparseAdamW
from .sampler import ClassSampler, make_sampler
from .trainer import DISDistillationTrainer
from .version import __version__

__all__ = [
    "ClassSampler",
    "DISConfig",
    "DISDistillationTrainer",
    "DISLoss",
    "DISReportCallback",
    "RowSparseAdamW",
    "__version__",
    "make_sampler",
]
