"""What a task is made of: its options, a draft of one example at some size, and the text that needles are hidden in."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nosa_jax.evals.metrics import Metric
from nosa_jax.train.data import stdlib_files
from pallas_kernels.checks import bad_value, require_int, require_number, require_one_of, require_type

_WIDTH = 120  # characters of a line of the haystack, at most


@dataclasses.dataclass(frozen=True)
class Draft:
    """One example as text.

    body: what the model reads: what to do, the context, the question.
    lead: the start of the answer, which stands behind the body.
    answer: how it goes on; it begins with a space.
    wanted: the strings that a right answer contains, in their order.
    marks: where in the body the evidence begins, in characters; empty where it is everywhere.
    """

    body: str
    lead: str
    answer: str
    wanted: tuple[str, ...]
    marks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Option:
    """An argument that makes a task easier or harder.

    default: its value unless given.
    meaning: in words.
    check: from the name and a value to that value; raises TypeError or ValueError for one that cannot be.
    """

    default: Any
    meaning: str
    check: Callable[[str, Any], Any]


def count_option(default: int, meaning: str, least: int = 1) -> Option:
    """An Option that counts something, at least `least`."""
    return Option(default, meaning, lambda name, value: require_int(name, value, least))


def choice_option(default: str, meaning: str, choices: Sequence[str]) -> Option:
    """An Option among some texts."""

    def check(name: str, value: Any) -> str:
        require_one_of(name, value, choices)
        return str(value)

    return Option(default, meaning, check)


def depth_option() -> Option:
    """Where the evidence lies, 0 at the start of the context and 1 at its end."""
    meaning = "where the evidence lies, from 0 (start of the context) to 1 (its end); None spreads examples evenly"
    return Option(
        None, meaning, lambda name, value: None if value is None else float(require_number(name, value, 0.0, 1.0))
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """What a draft is made from.

    random: the stream of this example; drafts of all sizes get the same.
    spread: a number in [0, 1) that examples 0, 1, 2, ... share out evenly.
    haystack: text to hide things in, for tasks that do.
    options: a value for each option of the task.
    """

    random: np.random.Generator
    spread: float
    haystack: Haystack | None
    options: Mapping[str, Any]

    def text(self, size: int) -> list[str]:
        """Lines of the haystack, `size` characters."""
        assert self.haystack is not None, "a task that hides things says so"
        return self.haystack.take(self.random, size)

    def depth(self) -> float:
        """The option `depth`, or this example's share of an even spread."""
        given = self.options["depth"]
        return self.spread if given is None else given


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that code makes.

    name: as in `make`.
    description: what is asked, in a sentence.
    metric: the name of the score in `METRICS` that answers are judged by.
    options: what makes it easier or harder, by name; `difficulty` has their values unless given.
    draft: from a Source and a size >= 0 to a Draft whose length grows with the size.
    hides: whether it needs a haystack.
    """

    name: str
    description: str
    metric: Metric
    options: Mapping[str, Option]
    draft: Callable[[Source, int], Draft]
    hides: bool = False

    @property
    def difficulty(self) -> dict[str, Any]:
        """The values of the options unless given."""
        return {name: option.default for name, option in self.options.items()}

    def checked(self, difficulty: Mapping[str, Any]) -> dict[str, Any]:
        """A value for every option. Raises TypeError or ValueError for an unknown name and for a bad value."""
        for name in difficulty:
            if name not in self.options:
                known = ", ".join(f"{known}={option.default!r}" for known, option in self.options.items()) or "none"
                raise bad_value("difficulty", f"must name options of {self.name} ({known})", repr(name), "Drop it.")
        given = {**self.difficulty, **difficulty}
        return {name: option.check(name, given[name]) for name, option in self.options.items()}


class Haystack:
    """Text to hide needles in, cut into lines.

    text: any text with words in it; where more is asked for than there is, it begins again.

    Raises TypeError for anything but text, ValueError for text without a word and for the name of a file.
    """

    def __init__(self, text: str) -> None:
        require_type("haystack", text, str, "Pass text, or None for docstrings of Python's standard library.")
        if os.path.isfile(text):  # also of text that no name could be
            raise bad_value("haystack", "must be text, not the name of a file", repr(text), "Pass what the file holds.")
        self._lines = [
            part
            for line in text.splitlines()
            for part in (textwrap.wrap(line, _WIDTH) if len(line) > _WIDTH else [line.rstrip()])
        ]
        self._ends = np.cumsum([len(line) + 1 for line in self._lines], dtype=np.int64).tolist()
        if not text.strip():
            raise bad_value("haystack", "must hold text", repr(text[:60]), "Pass text with words in it.")

    def take(self, random: np.random.Generator, size: int) -> list[str]:
        """Lines from a random one on, `size` characters with their line ends; the last line is cut after a word."""
        first, total = int(random.integers(len(self._lines))), self._ends[-1]
        before = self._ends[first - 1] if first else 0
        found: list[str] = []
        rounds, rest = divmod(before + size, total)
        last = bisect.bisect_right(self._ends, rest)
        if rounds == 0:
            found = self._lines[first:last]
        else:
            found = self._lines[first:] + self._lines * (rounds - 1) + self._lines[:last]
        left = size - sum(len(line) + 1 for line in found)
        cut = re.match(r"(.*\S)\s", self._lines[last][: max(left, 0)])
        return found + ([cut[1]] if cut else [])


@functools.cache
def default_haystack() -> Haystack:
    """Docstrings of the running Python's standard library, in the order of its files; those in ASCII, once each.

    Other versions of Python have other texts: pass a haystack of your own for numbers to be compared between them.
    """
    pattern = re.compile(r'^[ \t]*[rR]?"""(.{200,20000}?)"""', re.MULTILINE | re.DOTALL)
    found: dict[str, None] = {}
    for file in stdlib_files():
        text = file.read_text(encoding="utf-8", errors="replace")
        for docstring in pattern.findall(text):
            # Code between the end of one docstring and the start of the next is none.
            if docstring.isascii() and not re.search(
                r"^\s*(def|class|import|return|self\.) ?\w", docstring, re.MULTILINE
            ):
                found[inspect.cleandoc(docstring)] = None
    return Haystack("\n\n".join(found))


def hide(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> tuple[str, list[int]]:
    """The lines with each needle on a line of its own, and at which character each begins.

    depths: of the needles, ascending, 0 before the first line and 1 after the last one.
    """
    places = [round(depth * len(lines)) for depth in depths]
    parts: list[str] = []
    marks, at, done = [], 0, 0
    for needle, place in zip(needles, places, strict=True):
        for line in (*lines[done:place], needle):
            parts.append(line)
            at += len(line) + 1
        marks.append(at - len(needle) - 1)
        done = max(done, place)
    parts += lines[done:]
    return "\n".join(parts), marks


_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
_SYLLABLES = [c + v for c in _CONSONANTS for v in _VOWELS]


def invented_words(random: np.random.Generator, count: int) -> list[str]:
    """So many different words of three syllables, none of them part of another."""
    found: dict[int, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(random.integers(0, len(_SYLLABLES) ** 3, count - len(found)).tolist())
    return ["".join(_SYLLABLES[word // 100**place % 100] for place in range(3)) for word in found]


def numbers(random: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """So many different numbers of as many digits."""
    found: dict[int, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(random.integers(10 ** (digits - 1), 10**digits, count - len(found)).tolist())
    return [str(number) for number in found]


def uuids(random: np.random.Generator, count: int) -> list[str]:
    """So many random identifiers in the form of a UUID."""
    texts = (random.bytes(16).hex() for _ in range(count))
    return ["-".join((t[:8], t[8:12], t[12:16], t[16:20], t[20:])) for t in texts]


def sorted_depths(random: np.random.Generator, count: int) -> list[float]:
    """So many random depths, ascending."""
    return np.sort(random.random(count)).tolist()
