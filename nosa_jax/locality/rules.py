"""What all recorded selections obey; arrays that do not are refused before they are measured."""

from __future__ import annotations

import numpy as np

from pallas_kernels.checks import bad_value


def require_counting(positions: np.ndarray) -> None:
    """Raises ValueError unless positions [B, T] count up one by one in each row, then are -1."""
    steps = np.arange(positions.shape[1])
    used = (positions >= 0).sum(1, keepdims=True)
    wrong = positions != np.where(steps < used, positions[:, :1] + steps, -1)
    if wrong.any():
        row = int(wrong.any(-1).argmax())
        rule = "must count up one by one in each row, then be -1"
        raise bad_value("Selections.positions", rule, f"{positions[row]} in row {row}", "Record a whole run.")


def require_selections(block_ids: np.ndarray, own: np.ndarray) -> None:
    """Raises ValueError unless ids ascend strictly up to `own`, the query's block (-1: no ids at all), then are -1."""
    left, right = block_ids[..., :-1], block_ids[..., 1:]
    rules = (
        ("must hold block ids, or -1 for padding", block_ids < -1),
        ("must not name blocks behind the query, nor any for a padded step", block_ids > own),
        ("must ascend, no id twice, with -1 at the end", (right >= 0) & (right <= left) | (right >= 0) & (left < 0)),
    )
    for rule, wrong in rules:
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0][:-1])
            got = f"{block_ids[where]} in layer {where[0]}, row {where[1]}, KV head {where[2]}, step {where[3]}"
            raise bad_value("Selections.block_ids", rule, got, "Pass them as they were recorded.")
