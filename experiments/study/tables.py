"""The tables and figures of a run of the study, from the files that `experiments.study.run` wrote.

    python -m experiments.study.tables runs/study --output experiments/results/study_h200.json

Beside the JSON come NAME_quality.png (what each pool costs, and what each variant loses), NAME_position.png (loss by
position in the document) and, of a run with several of them, NAME_query_share.png. Differences between arms are of the
same documents and, for trained models, of the same seed; their intervals, 95 %, are by paired bootstrap over documents.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from experiments.study import figures

SAMPLES = 10_000  # of the bootstrap
# Parts of a document, of 16, by where they begin and end.
RANGES = {
    "all": (0, 16), "first quarter": (0, 4), "first half": (0, 8), "second quarter": (4, 8), "second half": (8, 16),
    "end": (12, 16),
}  # fmt: skip
BASE = "infllmv2"

Losses = Float64[np.ndarray, "documents parts"]


def read(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The files of the arms, by name and seed. Raises FileNotFoundError where there is none."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for file in sorted((folder / "arms").glob("*.json")):
        entry = json.loads(file.read_text())
        found[entry["arm"]][entry["seed"]] = entry
    if not found:
        raise FileNotFoundError(f"{folder / 'arms'}: must hold results, got none. Run experiments.study.run first.")
    return dict(found)


def interval(difference: Losses) -> list[float]:
    """Mean difference over documents and the 95 % interval of a bootstrap over them."""
    by_document = difference.mean(1)
    drawn = np.random.default_rng(0).integers(0, len(by_document), (SAMPLES, len(by_document)))
    low, high = np.percentile(by_document[drawn].mean(1), [2.5, 97.5])
    return [round(float(x), 5) for x in (by_document.mean(), low, high)]


def by_range(losses: Losses) -> dict[str, float]:
    return {name: round(float(losses[:, slice(*ends)].mean()), 5) for name, ends in RANGES.items()}


def difference(arms: Mapping[str, Mapping[int, Any]], name: str, other: str, when: str) -> tuple[int, Losses] | None:
    """How much more an arm loses than another, mean over the seeds that both have, and how many these are; None for
    none."""
    seeds = sorted(set(arms[name]) & set(arms.get(other, ())))
    pairs = [(arms[name][seed].get(when), arms[other][seed].get(when)) for seed in seeds]
    found = [np.array(one["losses"]) - np.array(two["losses"]) for one, two in pairs if one and two]
    return (len(found), np.mean(found, axis=0)) if found else None


def compared(arms: Mapping[str, Mapping[int, Any]], name: str, other: str, when: str) -> dict[str, Any] | None:
    """`difference` by range, with its intervals."""
    found = difference(arms, name, other, when)
    if found is None:
        return None
    seeds, whole = found
    return {"seeds": seeds} | {part: interval(whole[:, slice(*ends)]) for part, ends in RANGES.items()}


def spread(values: Sequence[float]) -> list[float | None]:
    """Mean, and the sample standard deviation, None where there is but one."""
    deviation = round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None
    return [round(float(np.mean(values)), 5), deviation]


def over_seeds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Losses by range and numbers of locality, those after less text under names of their own: mean and spread over
    seeds."""
    losses = [by_range(np.array(entry["losses"])) for entry in entries]
    found: dict[str, Any] = {"loss": {name: spread([one[name] for one in losses]) for name in RANGES}}
    for key in entries[0]:
        if key.startswith("locality"):
            numbers = numbers_over_seeds([entry[key] for entry in entries])
            found |= numbers if key == "locality" else {key: numbers}
    return found


def numbers_over_seeds(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every number, those in dictionaries too."""
    found: dict[str, Any] = {}
    for name, first in measured[0].items():
        values = [one[name] for one in measured]
        by_key = isinstance(first, dict)
        found[name] = {key: spread([one[key] for one in values]) for key in first} if by_key else spread(values)
    return found


def answers(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What the models of several seeds said to the same questions: mean and spread."""
    return [
        {name: rows[0][name] for name in ("task", "length", "count")}
        | {name: spread([row[name] for row in rows]) for name in ("exact", "tokens", "log_likelihood")}
        for rows in zip(*seeds, strict=True)
    ]


def other_of(name: str, arms: Mapping[str, Any], base: str) -> str:
    """The base variant with the same budget and training, where that was run."""
    _, _, rest = name.partition(", ")
    return f"{base}, {rest}" if f"{base}, {rest}" in arms else base


def summary(arms: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """By arm, before and after training: losses, locality, differences to InfLLMv2 and to `full`; tasks, biases."""
    found: dict[str, Any] = {}
    for name, by_seed in arms.items():
        entry: dict[str, Any] = {"seeds": sorted(by_seed), "attention": by_seed[min(by_seed)]["attention"]}
        for when in ("before", "after"):
            measured = [one[when] for one in by_seed.values() if when in one]
            if not measured:
                continue
            entry[when] = over_seeds(measured)
            for other in (other_of(name, arms, base) for base in (BASE, "full")):
                if other != name and (gap := compared(arms, name, other, when)):
                    entry[when][f"less {other}"] = gap
        biases = [one["other_bias"] for one in by_seed.values() if "other_bias" in one]
        if biases:
            entry["other_bias"] = {
                kind: {part: spread([by_range(np.array(one[kind]))[part] for one in biases]) for part in RANGES}
                for kind in biases[0]
            }
        for key in ("tasks_before", "tasks"):
            if asked := [one[key] for one in by_seed.values() if one.get(key)]:
                entry[key] = answers(asked)
        found[name] = entry
    return found


def markdown(table: Mapping[str, Any]) -> str:
    """The trained arms, one line each."""
    lines = [
        "| | seeds | loss | end | less InfLLMv2 | at the end | gamma | fetched at J, 1.25 J, 1.5 J, 2 J |",
        "|" + "---|" * 8,
    ]
    for name, entry in table.items():
        after = entry["after"]
        base = next((value for key, value in after.items() if key.startswith(f"less {BASE}")), None)
        above = ["", ""]
        if base:
            above = [f"{x[0]:+.4f} ({x[1]:+.4f} to {x[2]:+.4f})" for x in (base["all"], base["end"])]
        gamma = f"{after['gamma'][0]:.3f}" if "gamma" in after else ""
        fetched = ", ".join(f"{value[0]:.2f}" for value in after.get("misses", {}).values())
        loss = [f"{after['loss'][part][0]:.4f}" for part in ("all", "end")]
        lines.append(f"| {' | '.join([name, str(len(entry['seeds'])), *loss, *above, gamma, fetched])} |")
    return "\n".join(lines)


def tasks_markdown(table: Mapping[str, Any]) -> str:
    """Exact answers and likeliest tokens of what was asked, a column for each arm."""
    asked = {name: entry["tasks"] for name, entry in table.items() if "tasks" in entry}
    if not asked:
        return ""
    lines = ["| task, tokens | " + " | ".join(asked) + " |", "|" + "---|" * (1 + len(asked))]
    for rows in zip(*asked.values(), strict=True):
        cells = [f"{row['exact'][0]:.2f} ({row['tokens'][0]:.2f})" for row in rows]
        lines.append(f"| {rows[0]['task']}, {rows[0]['length']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the OUTPUT of experiments.study.run")
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes; pictures come beside it")
    args = parser.parse_args(arguments)
    arms = read(args.folder)
    table = summary(arms)
    first = next(iter(arms.values()))
    text = json.loads((args.folder / "text.json").read_text())
    result = {"environment": first[min(first)]["environment"], "text": text, "arms": table}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(table))
    print(tasks_markdown(table))
    stem = args.output.with_suffix("")
    figures.quality(table, stem.with_name(f"{stem.name}_quality.png"))
    figures.query_share(table, stem.with_name(f"{stem.name}_query_share.png"))
    less_full = {name: difference(arms, name, other_of(name, arms, "full"), "after") for name in arms if name != "full"}
    above = {name: found[1] for name, found in less_full.items() if found}
    figures.position(above, stem.with_name(f"{stem.name}_position.png"))


if __name__ == "__main__":
    main()
