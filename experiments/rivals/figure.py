"""Draws what policies answer against how fast they decode, and prints the table.

    python -m experiments.rivals.figure

Reads the JSON of `rivals.speed` and `rivals.quality` in `experiments/results` and writes rivals.png there. Speed is of
the 8B shape, 16 rows of 16K, at the share of wanted units that crossed the link on real text (in `rivals_quality`, of
the small model): on the straight line through the two times that `rivals_speed` has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from experiments.rivals.quality import ARKVALE, SHADOWKV
from nosa_jax import baselines

RESULTS = Path(__file__).parents[1] / "results"
NEEDLES = ("niah_single", "niah_multikey", "niah_multivalue")
# By name in the quality file: the run of the speed file, and wanted units there and here.
RUNS = {
    "full": ("full:16384:16:device", 1.0),
    "shadowkv, chunks of 8": ("shadowkv:16384:16", baselines.ShadowKV().num_wanted / SHADOWKV.num_wanted),
    "arkvale": ("arkvale:16384:16", baselines.ArkVale().num_wanted / ARKVALE.num_wanted),
}


def step_ms(entry: Mapping[str, Any], fetched: float) -> float:
    """The time of a step that fetches so many units, on the line through the two that were measured."""
    still, moving = entry["still"], entry["moving"]
    span = moving["fetched"] - still["fetched"]
    slope = (moving["step_ms"] - still["step_ms"]) / span if span else 0.0
    return float(still["step_ms"] + slope * (fetched - still["fetched"]))


def points(speed: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name: units fetched at the 8B shape, tokens per second there, and scores by task."""
    timed = {entry["run"]: entry for entry in speed["entries"] if "failed" not in entry}
    found = {}
    for entry in quality["entries"]:
        scores = {row["task"]: row["score"] for row in entry["tasks"]}
        found[entry["name"]] = {"scores": scores, "needles": sum(scores[task] for task in NEEDLES) / len(NEEDLES)}
        run, scale = RUNS.get(entry["name"], ("", 1.0))
        if run in timed:
            fetched = scale * (entry["fetched"] or 0.0)
            rows = int(run.split(":")[2])
            ms = step_ms(timed[run], fetched)
            found[entry["name"]] |= {"fetched": round(fetched, 2), "tokens_per_second": round(1e3 * rows / ms)}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, default=RESULTS / "rivals_speed_h100.json")
    parser.add_argument("--quality", type=Path, default=RESULTS / "rivals_quality_h100.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "rivals.png")
    args = parser.parse_args(arguments)
    found = points(json.loads(args.speed.read_text()), json.loads(args.quality.read_text()))
    tasks = list(next(iter(found.values()))["scores"])
    print(f"| | tokens/s | {' | '.join(tasks)} |\n|{'---|' * (2 + len(tasks))}")
    for name, point in found.items():
        cells = [f"{point['scores'][task]:.2f}" for task in tasks]
        print(f"| {name} | {point.get('tokens_per_second', '')} | {' | '.join(cells)} |")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, point in found.items():
        if "tokens_per_second" in point:
            axes.plot(point["tokens_per_second"], point["needles"], "o")
            axes.annotate(f" {name}", (point["tokens_per_second"], point["needles"]))
    axes.set(xlabel="tokens/s, 8B shape, 16 rows of 16K", ylabel="score, mean of three needle tasks", ylim=(0, 1))
    axes.margins(x=0.3)
    figure.savefig(args.output, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
