"""What the selection reads of a cache."""

from __future__ import annotations

from typing import Any, NamedTuple


class Summaries(NamedTuple):
    """Of all layers; None where a variant does not use it.

    keys [L, B, K, C, D] and key_sums [L, B, K, 2, D] float32: running pooled keys. importance [L, B, K, M, P] float32, per
    token; means [L, B, K, C, 1] and mean_sums [L, B, K, 2, 1] float32: the same pooled.
    """

    keys: Any
    key_sums: Any
    importance: Any
    means: Any
    mean_sums: Any
