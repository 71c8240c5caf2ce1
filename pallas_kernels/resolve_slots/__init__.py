"""Which slot of the device pool every selected block takes, and who must leave: least-recently-used.

Contract: resident blocks stay where they are; a missing one takes the slot that was used longest ago, empty slots
first, ties to the lowest block id. At most `slots` blocks are wanted at once, each once.
"""

from pallas_kernels.resolve_slots.api import resolve_slots

__all__ = ["resolve_slots"]
