"""The tasks, one family to a file, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nosa_jax.evals.tasks import needles, recall, records, tracking, words
from nosa_jax.evals.tasks.task import Draft, Haystack, Option, Task, default_haystack

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for family in (needles, tracking, words, recall, records) for task in family.TASKS}
)
"""Every task by its name."""

__all__ = ["TASKS", "Draft", "Haystack", "Option", "Task", "default_haystack"]
