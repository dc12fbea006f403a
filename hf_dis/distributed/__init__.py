"""Several processes: sums over processes, and what a training loop does with gradients, by torch.distributed."""

from hf_dis.distributed.processes import kept_from_ddp
from hf_dis.distributed.sums import average_rows, sum_over_processes
from hf_dis.head.row_gradients import clip_grad_norm_

__all__ = ["average_rows", "clip_grad_norm_", "kept_from_ddp", "sum_over_processes"]
