"""Counting words in long lists of them: the common and the frequent ones (after RULER, arXiv 2404.06654)."""

from __future__ import annotations

import numpy as np

from nosa_jax.evals.tasks.task import Draft, Option, Source, Task, count_option, invented_words
from pallas_kernels.checks import bad_value, require_number


def _shuffled(random: np.random.Generator, words: list[str], counts: list[int]) -> str:
    """Each word as often as its count says, in random order."""
    order = random.permutation(np.repeat(np.arange(len(words)), counts)).tolist()
    return " ".join(words[number] for number in order)


def _common(source: Source, size: int) -> Draft:
    random, options = source.random, source.options
    common, repeats, noise = options["common"], options["repeats"], options["noise_repeats"]
    if noise >= repeats:
        raise bad_value("noise_repeats", f"must be < repeats = {repeats}", noise, "Lower it, or raise repeats.")
    words = invented_words(random, common + size)
    text = _shuffled(random, words, [repeats] * common + [noise] * size)
    wanted = tuple(sorted(words[:common]))
    body = (
        f"Some words of the following list appear in it more often than the others. Find them.\n\n{text}\n\n"
        f"Which {common} words appear most often in the list? Give them in alphabetical order."
    )
    return Draft(body, "The most common words are", f" {', '.join(wanted)}", wanted)


def _frequent(source: Source, size: int) -> Draft:
    random, top, alpha = source.random, source.options["top"], source.options["alpha"]
    kinds = top + 1 + round(size**0.5)
    shares = np.arange(1, kinds + 1, dtype=float) ** -alpha
    counts = np.maximum(1, (size * shares / shares.sum()).astype(int)).tolist()
    for rank in reversed(range(top)):  # no two of the wanted words are equally frequent, however short the list
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    words = invented_words(random, kinds)
    wanted = tuple(words[:top])
    body = (
        f"Count the words in the following list.\n\n{_shuffled(random, words, counts)}\n\n"
        f"Which {top} words appear most often in the list? Give the most frequent one first."
    )
    return Draft(body, "The most frequent words are", f" {', '.join(wanted)}", wanted)


TASKS = (
    Task(
        "common_words",
        "Some invented words appear more often in a list than all others; which?",
        "recall",
        {
            "common": count_option(10, "words that are asked for"),
            "repeats": count_option(6, "how often each of them appears", least=2),
            "noise_repeats": count_option(2, "how often each other word appears"),
        },
        _common,
    ),
    Task(
        "frequent_words",
        "The words of a list are distributed by Zipf's law; which are the most frequent?",
        "recall",
        {
            "top": count_option(3, "words that are asked for"),
            "alpha": Option(
                2.0,
                "the exponent of Zipf's law; the closer to 1, the less the frequencies differ",
                lambda name, value: require_number(name, value, 1.0, 10.0),
            ),
        },
        _frequent,
    ),
)
