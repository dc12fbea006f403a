"""Several processes: their number, and sums over processes, by torch.distributed."""

from hf_dis.distributed.sums import average_rows, sum_over_processes

__all__ = ["average_rows", "sum_over_processes"]
