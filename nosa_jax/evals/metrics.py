"""How an answer as text is judged: functions of it and of the strings that are wanted, from 0 (wrong) to 1 (right)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

Metric = Literal["recall", "contains", "exact", "f1"]


def recall(text: str, wanted: Sequence[str]) -> float:
    """The share of the wanted strings that the text contains: the score of RULER (arXiv 2404.06654).

    Letters of either case are the same. Unlike there, a string counts only where it is not a part of a longer word or
    number.
    """
    return sum(_contains(text, string) for string in wanted) / len(wanted)


def contains(text: str, wanted: Sequence[str]) -> float:
    """1 where the text contains all of the wanted strings, see `recall`; else 0."""
    return float(all(_contains(text, string) for string in wanted))


def exact(text: str, wanted: Sequence[str]) -> float:
    """1 where the first line of the text that is not empty is the wanted strings in their order, joined by commas.

    Spaces around them, a full stop at the end and the case of letters do not matter.
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    said = [part.strip() for part in first.strip().removesuffix(".").lower().split(",")]
    return float(said == [string.lower() for string in wanted])


def f1(text: str, wanted: Sequence[str]) -> float:
    """The harmonic mean of recall and precision, which is the share of wanted strings among those that are named.

    Named is every word of the text that is written like a wanted one: with letters and digits in the same places.
    """
    shapes = {re.sub(r"[A-Za-z]+", lambda run: f"[A-Za-z]{{{len(run[0])}}}", _digits(string)) for string in wanted}
    named = {found.lower() for shape in shapes for found in re.findall(rf"(?<!\w){shape}(?!\w)", text)}
    right = len(named & {string.lower() for string in wanted})
    return 2 * right / (len(named) + len(set(wanted)))


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {"recall": recall, "contains": contains, "exact": exact, "f1": f1}
)
"""Every metric by its name."""


def _contains(text: str, string: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(string)}(?!\w)", text, re.IGNORECASE) is not None


def _digits(string: str) -> str:
    """A pattern of the string's digits in place, with other signs as they are."""
    return "".join(r"[0-9]" if sign.isdigit() else sign if sign.isalpha() else re.escape(sign) for sign in string)
