"""Caches of teacher targets on disk: written once, read in every epoch."""

from hf_dis.cache.reader import TeacherCache
from hf_dis.cache.views import SeededViews
from hf_dis.cache.writer import cache_teacher_targets

__all__ = ["SeededViews", "TeacherCache", "cache_teacher_targets"]
