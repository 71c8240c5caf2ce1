"""Which slot of the device pool every selected block takes, who must leave, and what must be loaded:
least-recently-used.

Contract: resident blocks stay where they are; a missing one takes the slot that was used longest ago, empty slots
first, ties to the lowest block id. At most `slots` blocks are wanted at once, each once.
`resolve_table` is the same rule for tables of any leading shape, in XLA. EMPTY is what an empty slot holds.
"""

from pallas_kernels.resolve_slots.api import resolve_slots
from pallas_kernels.resolve_slots.xla import EMPTY, Resolved, resolve_table

__all__ = ["EMPTY", "Resolved", "resolve_slots", "resolve_table"]
