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
MARKERS, POOLS = "osD^", ("J", "1.25 J", "1.5 J", "2 J")  # of pools of so many slots


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
    for marker, slots in zip(MARKERS, POOLS, strict=True):
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


def query_share(table: Mapping[str, Any], path: Path) -> None:
    """What it brings and costs that the query picks more of the blocks: loss, blocks fetched, needles found.

    Nothing is drawn with fewer than three shares. Importance picks nothing for InfLLMv2, which stands at the right.
    """
    names = ["nosa", "infllmv2", *(name for name in table if name.startswith("nosa, query share"))]
    names = [name for name in names if name in table and "tasks" in table[name]]
    if len(names) < 3 or any("less full" not in table[name]["after"] for name in names):
        return
    shares = {name: _query_share(table[name]["attention"]) for name in names}
    names.sort(key=shares.__getitem__)
    x = [shares[name] for name in names]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    lost = np.array([table[name]["after"]["less full"]["all"] for name in names])
    axes[0].errorbar(x, lost[:, 0], (lost[:, 0] - lost[:, 1], lost[:, 2] - lost[:, 0]), fmt="o-", capsize=3)
    pools = zip(*(table[name]["after"]["misses"].values() for name in names), strict=True)
    for marker, pool, fetched in zip(MARKERS, POOLS, pools, strict=False):
        axes[1].plot(x, [mean for mean, _ in fetched], f"{marker}-", label=f"{pool} slots")
    asked = [{(row["task"], row["length"]): row["tokens"][0] for row in table[name]["tasks"]} for name in names]
    for task, length in sorted(asked[0]):
        if task.startswith("niah") and length == max(length for _, length in asked[0]):
            axes[2].plot(x, [one[task, length] for one in asked], "o-", label=f"{task}, {length}")
    titles = ("loss above dense attention, nats", "blocks fetched per step and head", "answers' tokens right")
    for one, title in zip(axes, titles, strict=True):
        one.set(xlabel="share of blocks picked by the query", title=title, ylim=(0, None))
    axes[1].legend(fontsize=8)
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _query_share(attention: Mapping[str, Any]) -> float:
    """Of the selected blocks, those that the query picks: for InfLLMv2 all that are not forced."""
    selected = attention["num_selected_blocks"]
    if attention["variant"] == "nosa":
        return float(attention["num_query_blocks"] / selected)
    return float((selected - attention["num_sink_blocks"] - attention["num_local_blocks"]) / selected)
