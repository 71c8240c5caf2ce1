"""Which documents share a row, so that little of it is padding."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64


def pack(sizes: Int64[np.ndarray, " N"], capacity: int) -> Int64[np.ndarray, " N"]:
    """The bin of each item, all of `capacity`: best fit, largest first.

    sizes: of the items, from 1 to `capacity`.

    All items of one size are placed together, bins by the space that they have left: the time taken grows with the
    number of different sizes, hardly with that of items.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    spaces = _Spaces()
    done = opened = 0
    for size, items in sorted(_count(sizes).items(), reverse=True):
        place = order[done : done + items]
        done += items
        while len(place):
            space = spaces.smallest(size)
            fitting = (space or capacity) // size
            wanted = -(-len(place) // fitting)
            if space is None:
                candidates, space = np.arange(opened, opened + wanted), capacity
                opened += wanted
            else:
                candidates = spaces.take(space, wanted)
            filled = np.repeat(candidates, fitting)[: len(place)]
            bins[place[: len(filled)]] = filled
            last = len(filled) - fitting * (len(candidates) - 1)  # items in the last of these bins, not more than fit
            spaces.put(space - fitting * size, candidates[:-1])
            spaces.put(space - last * size, candidates[-1:])
            place = place[len(filled) :]
    return bins


class _Spaces:
    """Bins that are not full, by the space left in them."""

    def __init__(self) -> None:
        self._bins: dict[int, np.ndarray] = {}

    def smallest(self, size: int) -> int | None:
        """The smallest space that `size` fits into, None without any."""
        return min((space for space in self._bins if space >= size), default=None)

    def take(self, space: int, count: int) -> np.ndarray:
        """Up to `count` bins with `space`; they are no longer here."""
        bins = self._bins.pop(space)
        self.put(space, bins[count:])
        return bins[:count]

    def put(self, space: int, bins: np.ndarray) -> None:
        if space and len(bins):
            before = self._bins.get(space)
            self._bins[space] = bins if before is None else np.concatenate([before, bins])


def _count(sizes: np.ndarray) -> dict[int, int]:
    found, counts = np.unique(sizes, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
