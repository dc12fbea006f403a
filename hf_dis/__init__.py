"""hf_dis: knowledge distillation for huge output layers (Dynamic Importance Sampling, arXiv 1812.00914)."""

from .callbacks import DISReportCallback
from .config import DISConfig
from .data.cache_writer import cache_teacher_targets
from .data.teacher_cache import TeacherCache
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
    "TeacherCache",
    "__version__",
    "cache_teacher_targets",
    "make_sampler",
]
