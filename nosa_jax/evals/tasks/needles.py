"""Needles in a haystack: numbers that are named in one line each of a long text (after RULER, arXiv 2404.06654)."""

from __future__ import annotations

import numpy as np

from nosa_jax.evals.tasks.task import (
    Draft,
    Source,
    Task,
    choice_option,
    count_option,
    depth_option,
    hide,
    invented_words,
    numbers,
    sorted_depths,
    uuids,
)

_VALUES = ("number", "word", "uuid")
_MAKERS = {"number": numbers, "word": invented_words, "uuid": uuids}
_VALUE = choice_option("number", "what is hidden: a number of seven digits, an invented word or a UUID", _VALUES)

_FIRST = (
    "amber", "brave", "calm", "dusty", "early", "faint", "gentle", "hollow", "ivory", "jolly", "keen", "lively",
    "mellow", "narrow", "olive", "polite", "quick", "rusty", "silent", "tidy", "upper", "vivid", "windy",
    "young",
)  # fmt: skip
_SECOND = (
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket",
    "kettle", "ladder", "meadow", "needle", "orchard", "pencil", "quarry", "river", "saddle", "tunnel",
    "valley", "window", "yard", "basket",
)  # fmt: skip


def _keys(random: np.random.Generator, count: int) -> list[str]:
    """So many different keys, such as "amber harbor"; invented words where there are not so many pairs."""
    pairs = len(_FIRST) * len(_SECOND)
    if count > pairs:
        return invented_words(random, count)
    chosen = random.choice(pairs, count, replace=False).tolist()
    return [f"{_FIRST[pair // len(_SECOND)]} {_SECOND[pair % len(_SECOND)]}" for pair in chosen]


def _draft(
    source: Source, size: int, keys: list[str], values: list[str], depths: list[float], asked: list[int]
) -> Draft:
    """Needles that give each key its value, of which those with the numbers `asked` are wanted."""
    needles = [f"The secret code of the {key} is {value}." for key, value in zip(keys, values, strict=True)]
    text, marks = hide(source.text(size), needles, depths)
    intro = "Some secret codes are hidden in the following text. Remember them: you will be asked for them.\n\n"
    names = list(dict.fromkeys(keys[number] for number in asked))
    wanted = tuple(values[number] for number in asked)
    if len(names) > 1:
        listed = ", ".join(f"the {name}" for name in names)
        question = f"What are the secret codes of {listed}? Give one code for each, in this order."
        lead = "The secret codes are"
    elif len(wanted) > 1:
        question = f"What are all the secret codes of the {names[0]}, in the order in which the text gives them?"
        lead = f"The secret codes of the {names[0]} are"
    else:
        question = f"What is the secret code of the {names[0]}?"
        lead = f"The secret code of the {names[0]} is"
    places = tuple(len(intro) + marks[number] for number in asked)
    return Draft(f"{intro}{text}\n\n{question}", lead, f" {', '.join(wanted)}", wanted, places)


def _single(source: Source, size: int) -> Draft:
    key, value = _keys(source.random, 1), _MAKERS[source.options["value"]](source.random, 1)
    return _draft(source, size, key, value, [source.depth()], [0])


def _multikey(source: Source, size: int) -> Draft:
    count, random = source.options["keys"], source.random
    keys, values = _keys(random, count), _MAKERS[source.options["value"]](random, count)
    depths = sorted([*random.random(count - 1).tolist(), source.depth()])
    return _draft(source, size, keys, values, depths, [depths.index(source.depth())])


def _multivalue(source: Source, size: int) -> Draft:
    count, random = source.options["values"], source.random
    keys, values = _keys(random, 1) * count, _MAKERS[source.options["value"]](random, count)
    return _draft(source, size, keys, values, sorted_depths(random, count), list(range(count)))


def _multiquery(source: Source, size: int) -> Draft:
    count, random = source.options["queries"], source.random
    keys, values = _keys(random, count), _MAKERS[source.options["value"]](random, count)
    depths, asked = sorted_depths(random, count), random.permutation(count).tolist()
    return _draft(source, size, keys, values, depths, asked)


TASKS = (
    Task(
        "niah_single",
        "One line of a long text gives a key its value; what is it?",
        "recall",
        {"depth": depth_option(), "value": _VALUE},
        _single,
        hides=True,
    ),
    Task(
        "niah_multikey",
        "Several lines of a long text give different keys their values; what is that of one of them?",
        "recall",
        {
            "keys": count_option(4, "keys in the text, of which one is asked for"),
            "depth": depth_option(),
            "value": _VALUE,
        },
        _multikey,
        hides=True,
    ),
    Task(
        "niah_multivalue",
        "Several lines of a long text give one key different values; what are they all?",
        "recall",
        {"values": count_option(4, "values of the key"), "value": _VALUE},
        _multivalue,
        hides=True,
    ),
    Task(
        "niah_multiquery",
        "Several lines of a long text give different keys their values; what are those of all of them?",
        "recall",
        {"queries": count_option(4, "keys in the text, all of which are asked for"), "value": _VALUE},
        _multiquery,
        hides=True,
    ),
)
