"""Tracking of variables: chains of assignments in a long text (after RULER, arXiv 2404.06654)."""

from __future__ import annotations

import itertools

import numpy as np

from nosa_jax.evals.tasks.task import Draft, Source, Task, count_option, hide, numbers, sorted_depths

_LETTERS = list("BCDFGHJKLMNPQRSTVWXZ")


def _names(random: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(_LETTERS, 5))] = None
    return list(found)


def _tracking(source: Source, size: int) -> Draft:
    random, chains, hops = source.random, source.options["chains"], source.options["hops"]
    names, values = _names(random, chains * (hops + 1)), numbers(random, chains, digits=5)
    placed: list[tuple[float, int, str]] = []
    for chain in range(chains):
        members = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        said = [f"VAR {members[0]} = {values[chain]}"]
        said += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(members)]
        # Each chain in its order, whatever stands between.
        placed += zip(sorted_depths(random, hops + 1), [chain] * (hops + 1), said, strict=True)
    placed.sort(key=lambda entry: entry[0])
    text, marks = hide(source.text(size), [said for *_, said in placed], [depth for depth, *_ in placed])
    intro = "Some lines of the following text assign values to variables. Keep track of them.\n\n"
    question = (
        f"Which variables have the value {values[0]}, directly or through other variables? Name all {hops + 1} "
        "of them, in the order in which they are assigned."
    )
    wanted = tuple(names[: hops + 1])
    places = tuple(len(intro) + mark for mark, (_, chain, _) in zip(marks, placed, strict=True) if chain == 0)
    lead = f"The variables with the value {values[0]} are"
    return Draft(f"{intro}{text}\n\n{question}", lead, f" {', '.join(wanted)}", wanted, places)


TASKS = (
    Task(
        "variable_tracking",
        "Lines of a long text assign a number to a variable, that to another, and so on; which variables have it?",
        "recall",
        {
            "chains": count_option(1, "chains of assignments, of which one is asked for"),
            "hops": count_option(4, "assignments from variable to variable in a chain"),
        },
        _tracking,
        hides=True,
    ),
)
