"""Draws the figure of `experiments.decode_throughput`: speed and transfers by slots, and the rivals at long contexts.

    python -m experiments.plot_decode

Reads the JSON in `experiments/results` and writes `decode_h200.png` there. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
COLORS = {"nosa": "tab:blue", "infllmv2": "tab:orange", "full": "tab:gray"}


def entries(name: str) -> list[dict[str, Any]]:
    """Returns the entries of a result file whose rows are equally long."""
    found = json.loads((RESULTS / name).read_text())["entries"]
    return [e for e in found if "failed" not in e and e["run"]["context"][0] == e["run"]["context"][1]]


def by_slots(speed: Axes, moved: Axes) -> None:
    offloaded = [e for e in entries("decode_16k_h200.json") if e["run"]["cache"]["slots"] is not None]
    nosa = [e for e in offloaded if e["run"]["variant"] == "nosa"]
    nosa.sort(key=lambda e: e["run"]["cache"]["slots"])
    slots = [e["run"]["cache"]["slots"] for e in nosa]
    speed.plot(slots, [e["tokens_per_second"] for e in nosa], "o-", label="nosa")
    bound = [e["run"]["batch"] / (1e-3 * (e["hbm_ms"] + e["link_ms"])) for e in nosa]
    speed.plot(slots, bound, "--", color=COLORS["nosa"], label="its bytes: device memory, then the link")
    moved.plot(slots, [e["fetched_per_table"] for e in nosa], "o-", label="nosa")
    moved.plot(slots, [e["replayed_per_table"] for e in nosa], "x", color="black", label="replayed")
    for e in offloaded:
        if e["run"]["variant"] == "infllmv2":
            at = e["run"]["cache"]["slots"]
            speed.plot(at, e["tokens_per_second"], "s", color=COLORS["infllmv2"], label="infllmv2")
            moved.plot(at, e["fetched_per_table"], "s", color=COLORS["infllmv2"], label="infllmv2")
    speed.set(title="16 rows of 16K tokens", ylabel="tokens per second", ylim=(0, None))
    moved.set(title="the same rows", ylabel="blocks fetched per step,\nlayer, KV head and row", ylim=(0, None))
    for axes in (speed, moved):
        axes.set(xlabel="slots on the device", xticks=slots)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def rivals(axes: Axes) -> None:
    found = entries("decode_96k_h200.json") + entries("decode_64k_h200.json")
    found.sort(key=lambda e: (-e["run"]["context"][0], e["tokens_per_second"]))
    labels = []
    for place, e in enumerate(found):
        run, slots = e["run"], e["run"]["cache"]["slots"]
        where = "on the device" if slots is None else f"{slots} slots"
        labels.append(f"{run['context'][0] // 1024}K x {run['batch']}, {run['variant']}, {where}")
        bar = axes.barh(place, e["tokens_per_second"], color=COLORS[run["variant"]])
        axes.bar_label(bar, fmt="{:,.0f}", fontsize=8, padding=2)
    axes.set(title="long contexts", xlabel="tokens per second", yticks=range(len(labels)), xlim=(0, 6800))
    axes.set_yticklabels(labels, fontsize=8)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figure, (speed, moved, long) = plt.subplots(1, 3, figsize=(13.5, 3.8))
    by_slots(speed, moved)
    rivals(long)
    figure.suptitle("8B shape, nosa and infllmv2 with the cache in host memory, one H200", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "decode_h200.png", dpi=130)


if __name__ == "__main__":
    main()
