"""Draws the figure of `experiments.decode_throughput`: tokens per second and transfers by slots, against the floors.

python -m experiments.plot_decode
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FILE = "decode_16k_h200.json"


def main() -> None:
    entries: list[dict[str, Any]] = json.loads((RESULTS / FILE).read_text())["entries"]
    entries = [e for e in entries if "failed" not in e and e["run"]["cache"]["slots"] is not None]
    nosa = sorted((e for e in entries if e["run"]["variant"] == "nosa"), key=lambda e: e["run"]["cache"]["slots"])
    slots = [e["run"]["cache"]["slots"] for e in nosa]
    figure, (speed, moved) = plt.subplots(1, 2, figsize=(8.4, 3.6))
    speed.plot(slots, [e["tokens_per_second"] for e in nosa], "o-", label="nosa")
    bound = [e["run"]["batch"] / (1e-3 * (e["hbm_ms"] + e["link_ms"])) for e in nosa]
    speed.plot(slots, bound, "--", color="tab:blue", label="its bytes: device memory, then the link")
    moved.plot(slots, [e["fetched_per_table"] for e in nosa], "o-", label="nosa")
    moved.plot(slots, [e["replayed_per_table"] for e in nosa], "x", color="black", label="replayed")
    for e in entries:
        if e["run"]["variant"] == "infllmv2":
            at = e["run"]["cache"]["slots"]
            speed.plot(at, e["tokens_per_second"], "s", color="tab:orange", label="infllmv2")
            moved.plot(at, e["fetched_per_table"], "s", color="tab:orange", label="infllmv2")
    speed.set(ylabel="tokens per second", ylim=(0, None))
    moved.set(ylabel="blocks fetched per step,\nlayer, KV head and row", ylim=(0, None))
    for axes in (speed, moved):
        axes.set(xlabel="slots on the device", xticks=slots)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle("8B shape, 16 rows of 16K tokens, cache in host memory, one H200", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "decode_h200.png", dpi=130)


if __name__ == "__main__":
    main()
