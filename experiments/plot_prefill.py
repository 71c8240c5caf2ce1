"""Draws the figure of `experiments.prefill`: time over dense attention by cuDNN, forward and with gradients.

    python -m experiments.plot_prefill

Reads the JSON in `experiments/results` and writes `prefill_h200.png` there. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FILES = ("prefill_h200.json", "prefill_long_h200.json")
LINES = {
    "whole op forward": ("dense cudnn forward", "tab:blue", "--"),
    "whole op forward+backward": ("dense cudnn forward+backward", "tab:blue", "-"),
    "block attention auto forward": ("dense cudnn forward", "tab:orange", "--"),
    "block attention auto forward+backward": ("dense cudnn forward+backward", "tab:orange", "-"),
}


def times() -> dict[tuple[str, int], float]:
    """Milliseconds by (what, tokens) at 16 query heads per KV head."""
    entries = [entry for file in FILES for entry in json.loads((RESULTS / file).read_text())["entries"]]
    return {(e["what"], e["tokens"]): e["ms"] for e in entries if "ms" in e and "group" not in e}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measured = times()
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for what, (peer, colour, style) in LINES.items():
        lengths = sorted(tokens for name, tokens in measured if name == what)
        ratios = [measured[what, tokens] / measured[peer, tokens] for tokens in lengths]
        axes.plot(lengths, ratios, style, color=colour, marker="o", label=what.replace(" auto", ""))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.text(131072, 1.04, "dense attention, cuDNN", fontsize=8, ha="right")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time / time of dense attention", xticks=lengths)
    axes.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths], minor=False)
    axes.minorticks_off()
    axes.set_yticks([0.1, 0.25, 0.5, 1, 1.5], ["0.1", "0.25", "0.5", "1", "1.5"])
    axes.set_title("NOSA attention on one H200, 32 query and 2 KV heads of 128, bfloat16", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "prefill_h200.png", dpi=130)


if __name__ == "__main__":
    main()
