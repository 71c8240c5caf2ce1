"""Pages of the host store: what each row may grow to, which pages that takes, and who owns a page.

All of it happens outside the decode step and, but for `own_rooms`, on the host: no array of a device is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from nosa_jax._pytree import short_repr
from pallas_kernels import blocks
from pallas_kernels.checks import bad_type, bad_value, is_concrete, require_int, require_size


class Rooms(NamedTuple):
    """What rows may grow to, and where.

    limits: tokens that each row may hold. page_table: the page of each row's blocks, -1 for none.
    """

    limits: Int32[Array, " B"]
    page_table: Int32[Array, "B M"]

    def __repr__(self) -> str:
        return short_repr(self)


def as_row_limits(max_length: Any, batch: int) -> np.ndarray | None:
    """One limit per row, int32 [B]; None where `max_length` is one number for all rows, which is not looked at.

    Raises TypeError or ValueError for another number of rows, for limits below 1 and for traced ones: the host store
    takes as many pages as they say, and its shape must be known.
    """
    is_array = isinstance(max_length, np.ndarray | jax.Array)
    if not (max_length.ndim > 0 if is_array else isinstance(max_length, list | tuple)):
        return None
    if not is_concrete(*jax.tree.leaves(max_length)):
        remedy = "Pass a list or a NumPy array from outside, or one int for all rows."
        raise bad_type("max_length", "one per row must be known where jax.jit traces", "a traced array", remedy)
    given = np.asarray(max_length) if is_array else max_length
    if len(given) != batch or (is_array and given.ndim > 1):
        got = f"shape {tuple(given.shape)}" if is_array else f"{len(given)} of them"
        raise bad_value("max_length", f"must be an int, or one per row, [B] = [{batch}]", got, "Pass one per row.")
    return np.array([require_size(f"max_length[{row}]", limit, 1) for row, limit in enumerate(given)], np.int32)


def own_rooms(batch: int, max_length: int, block_size: int) -> Rooms:
    """Rooms of rows that may all grow to `max_length`: each has a page for every block, one row after the other."""
    m = blocks.num_blocks(max_length, block_size)
    limit = min(max_length, np.iinfo(np.int32).max)  # no row gets so far: positions are int32
    table = jnp.arange(batch * m, dtype=jnp.int32).reshape(batch, m)
    return Rooms(jnp.full((batch,), limit, jnp.int32), table)


def rooms_of(limits: np.ndarray, block_size: int, devices: int = 1) -> tuple[Rooms, int]:
    """Rooms of rows with the pages that their limits need and no more, and how many pages that is on each device.

    limits: int32 [B].
    devices: how many share the rows, each an equal part of them in their order. Each has as many pages as the one that
        needs most, since an array is cut evenly.
    """
    counts = blocks_of(limits, block_size)
    pages = pages_of_a_device(counts, devices)
    of_devices = enumerate(counts.reshape(devices, -1))
    rows = [ids + device * pages for device, part in of_devices for ids in Pages(pages).give(part)]
    return Rooms(jnp.asarray(limits), page_table_of(rows, int(counts.max()))), pages


def blocks_of(limits: np.ndarray, block_size: int) -> np.ndarray:
    """The blocks, and so the pages, that each row needs for its limit."""
    return -(-limits // block_size)


def pages_of_a_device(counts: np.ndarray, devices: int = 1) -> int:
    """Pages that each device needs for rows of so many blocks."""
    return int(counts.reshape(devices, -1).sum(1).max())


def page_table_of(rows: Sequence[Any], num_blocks: int) -> Int32[Array, "B M"]:
    """The page table of rows that have these pages, int [n] each, for their first n blocks.

    num_blocks: M, the most that any row may have.
    Raises ValueError for a row with more.
    """
    table = np.full((len(rows), num_blocks), -1, np.int32)
    for row, ids in enumerate(rows):
        if len(ids) > num_blocks:
            rule = f"a row may have at most num_blocks = {num_blocks} pages"
            raise bad_value("rows", rule, f"{len(ids)} for row {row}", "Give it fewer, or make the table wider.")
        table[row, : len(ids)] = ids
    return jnp.asarray(table)


class Pages:
    """Which pages of a host store are given out, and how many owners each has; numbers on the host alone.

    A page is one block of one row, in all layers. It has an owner for every row that it was given to or shared with,
    and is free again when the last one has given it back. A fresh one gives pages in their order, as `prefill` does:
    `Pages(state.host.shape[1]).give(counts)`, with ceil(limit / P) pages per row, names what its rows have. (On a mesh
    every device has pages of its own, and a `Pages` counts those of one; see `page_range`.)

    Methods raise TypeError or ValueError for what cannot be, and then change nothing.
    """

    def __init__(self, total: int):
        """total: pages of the store."""
        self._owners = np.zeros(require_size("total", total, 0), np.int32)
        self._free = list(range(self.total - 1, -1, -1))  # given from its end: page 0 first, then what came back last

    def __repr__(self) -> str:
        return f"Pages(total={self.total}, used={self.used})"

    @property
    def total(self) -> int:
        """Pages of the store."""
        return len(self._owners)

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody owns; one of several owners counts once."""
        return self.total - self.free

    def owners(self, page: int) -> int:
        """How many own a page; 0 for a free one."""
        return int(self._owners[require_size("page", page, 0, self.total - 1)])

    def give(self, counts: Iterable[Any]) -> list[np.ndarray]:
        """Pages for rows, int32 [count] for each: free ones, which then have one owner. All rows get theirs, or none.

        counts: pages for each row, 0 or more.
        """
        counts = [require_int("counts", count, 0, "must hold numbers >= 0") for count in counts]
        if sum(counts) > self.free:
            remedy = "Take pages back first, wait for rows to end, or make the store larger."
            raise bad_value("counts", f"must add up to at most {self.free}, the free pages", sum(counts), remedy)
        rows = [np.array([self._free.pop() for _ in range(count)], np.int32) for count in counts]
        for ids in rows:
            self._owners[ids] = 1
        return rows

    def share(self, ids: Any) -> None:
        """One more owner for each of these pages, int [n], which must have one: rows that begin alike share blocks."""
        self._owners += self._counted(ids, "share", "Give free pages with `give`.")

    def take_back(self, ids: Any) -> None:
        """One owner less for each of these pages, int [n]; what nobody owns any more is free."""
        counted = self._counted(ids, "take back", "Take back what was given or shared, once per owner.")
        if (counted > self._owners).any():
            page = int(np.argmax(counted > self._owners))
            got = f"page {page} {counted[page]} times, with {self._owners[page]} owners"
            raise bad_value("ids", "may name a page as often as it has owners", got, "Take it back once per owner.")
        self._owners -= counted
        freed = np.flatnonzero((counted > 0) & (self._owners == 0))
        self._free.extend(freed[::-1].tolist())

    def _counted(self, ids: Any, what: str, remedy: str) -> np.ndarray:
        """How often each page is named, int32 [total]. Raises unless somebody owns what is named."""
        ids = [require_int("ids", page, 0, "must hold numbers >= 0") for page in ids]
        for page in ids:
            if page >= self.total or self._owners[page] == 0:
                got = f"page {page}" + (f" of {self.total}" if page >= self.total else "")
                raise bad_value("ids", f"must be pages that somebody owns, to {what}", got, remedy)
        return np.bincount(np.array(ids, np.int64), minlength=self.total).astype(np.int32)
