"""The figures of the study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float64

COLORS = {"infllmv2": "tab:orange", "nosa": "tab:blue", "dma": "tab:green", "nosa, fitted start": "tab:purple"}
MARKERS = "osD^"  # pools of J, 1.25 J, 1.5 J and 2 J slots


def quality(table: Mapping[str, Any], path: Path) -> None:
    """What a variant loses against dense attention, over what its pools move per token."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, color in COLORS.items():
        entry = table.get(name)
        if entry is None or "less full" not in entry["after"]:
            continue
        after = entry["after"]
        lost, low, high = after["less full"]["all"]
        moved = [value[0] / 1e6 for value in after["bytes_per_token"].values()]
        axes.fill_between([min(moved), max(moved) + 1e-9], low, high, color=color, alpha=0.15, lw=0)
        axes.plot(moved, [lost] * len(moved), color=color, lw=1)
        for marker, x in zip(MARKERS, moved, strict=False):
            axes.plot(x, lost, marker, color=color, label=name if marker == MARKERS[0] else None)
    axes.axhline(0, color="gray", lw=1, ls=":")
    axes.text(1, 0, "dense attention, all of the cache ", ha="right", va="bottom", color="gray",
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xlabel="MB from host memory per token and row (bfloat16)", ylabel="loss above dense attention, nats")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(0, 1.5 * axes.get_xlim()[1])
    for marker, slots in zip(MARKERS, ("J", "1.25 J", "1.5 J", "2 J"), strict=True):
        axes.plot([], [], marker, color="black", label=f"{slots} slots")
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def position(above: Mapping[str, Float64[np.ndarray, "documents parts"]], path: Path) -> None:
    """How much more than dense attention each variant loses, by position in the document."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, color in COLORS.items():
        if name not in above:
            continue
        difference = above[name]
        mean, error = difference.mean(0), difference.std(0, ddof=1) / np.sqrt(len(difference))
        place = (np.arange(len(mean)) + 0.5) / len(mean)
        axes.plot(place, mean, color=color, label=name)
        axes.fill_between(place, mean - 2 * error, mean + 2 * error, color=color, alpha=0.15, lw=0)
    axes.axhline(0, color="gray", lw=1, ls=":")
    axes.set(xlabel="position, as a share of the document", ylabel="loss above dense attention, nats")
    if axes.lines[1:]:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
