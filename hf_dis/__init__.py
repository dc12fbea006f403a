"""hf_dis: knowledge distillation for huge output layers (Dynamic Importance Sampling, arXiv 1812.00914)."""

from hf_dis.arguments import DISArguments
from hf_dis.build import build_distiller
from hf_dis.cache import TeacherCache, cache_teacher_targets
from hf_dis.dis_loss import DISLoss
from hf_dis.distiller import Distiller
from hf_dis.head.optimizer import RowSparseAdamW
from hf_dis.head.sharded import ShardedHead, shard_head
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.report.callback import DISReportCallback
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.sampling.sampler import ClassSampler, make_sampler
from hf_dis.trainer.config import DISConfig
from hf_dis.trainer.mixin import DISTrainerMixin
from hf_dis.trainer.trainer import DISDistillationTrainer
from hf_dis.version import __version__

__all__ = [
    "ClassSampler",
    "DISArguments",
    "DISConfig",
    "DISDistillationTrainer",
    "DISLoss",
    "DISReportCallback",
    "DISTrainerMixin",
    "Distiller",
    "RowSparseAdamW",
    "SamplerSpec",
    "ShardedHead",
    "TeacherCache",
    "VocabShard",
    "__version__",
    "build_distiller",
    "cache_teacher_targets",
    "make_sampler",
    "shard_head",
]
