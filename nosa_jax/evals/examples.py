"""Examples of the tasks, cut to a length in tokens."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nosa_jax.evals.chats import TemplateLike, as_template
from nosa_jax.evals.tasks import TASKS, Draft, Haystack, Task, default_haystack
from nosa_jax.evals.tasks.task import Source
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from nosa_jax.train.data.template import ChatTemplate
from pallas_kernels.checks import bad_type, bad_value, require_bool, require_int

Tokenizer = ByteTokenizer | FileTokenizer
SLACK = 16
"""Tokens beyond the answer that a model may take to give it."""
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many they are


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its answer.

    task, length, seed, index, difficulty: what it was made for; `difficulty` as pairs of name and value, all of them.
    prompt: the whole text that a model reads, in the form of a chat where that was asked for.
    prompt_ids: its tokens.
    answer: how the text goes on where the answer is right; it begins with a space.
    answer_ids: its tokens behind those of the prompt.
    wanted: the strings that a right answer contains, in their order.
    room: tokens that are left for the answer; `len(prompt_ids) + room <= length`.
    needles: at which tokens of the prompt the evidence begins; empty where it is everywhere.
    """

    task: str
    length: int
    seed: int
    index: int
    difficulty: tuple[tuple[str, Any], ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    wanted: tuple[str, ...]
    room: int
    needles: tuple[int, ...]

    @property
    def depths(self) -> tuple[float, ...]:
        """Where in the prompt the evidence begins, from 0 (its start) to 1 (its end)."""
        return tuple(token / len(self.prompt_ids) for token in self.needles)


def make(
    task: str,
    length: int,
    tokenizer: Tokenizer,
    count: int = 50,
    seed: int = 0,
    *,
    haystack: str | Haystack | None = None,
    chat: bool = False,
    template: TemplateLike = None,
    **difficulty: Any,
) -> list[Example]:
    """Examples of a task, each nearly as long as it may be.

    task: a name in `TASKS`.
    length: tokens of the prompt together with the room for its answer, at most.
    tokenizer: as `nosa_jax.hf.load_tokenizer` gives it.
    count: how many. The first of them are the same whatever the count.
    seed: of the random numbers. Every task, length, seed and example has its own stream.
    haystack: text to hide things in, where a task does that; None for docstrings of Python's standard library.
    chat: whether the prompt is wrapped in a chat template, as what a user says and the start of the answer. Special
        tokens are then those that the template writes; else those that the tokenizer adds to any text.
    template: the source of a Jinja template, the folder of a model that comes with one, or a ChatTemplate.
    difficulty: options of the task, see `TASKS[task].options`.

    Raises TypeError or ValueError for an unknown task or option, for values that cannot be, and for a length that not
    even the smallest example fits in.
    """
    kind = find_task(task)
    length, count = require_int("length", length, 1), require_int("count", count, 1)
    seed = require_int("seed", seed, 0)
    require_tokenizer(tokenizer)
    options = kind.checked(difficulty)
    found = default_haystack() if haystack is None and kind.hides else haystack
    found = found if found is None or isinstance(found, Haystack) else Haystack(found)
    writer = _Writer(tokenizer, as_template(template) if require_bool("chat", chat) else None)
    return [_example(kind, length, seed, index, options, found, writer) for index in range(count)]


def find_task(name: str) -> Task:
    """The task of this name; raises ValueError where there is none."""
    if not isinstance(name, str) or name not in TASKS:
        raise bad_value("task", f"must be one of {', '.join(TASKS)}", repr(name), "See evals.TASKS.")
    return TASKS[name]


def require_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError for anything but a tokenizer."""
    if not isinstance(tokenizer, ByteTokenizer | FileTokenizer):
        remedy = "Pass what nosa_jax.hf.load_tokenizer gives, or ByteTokenizer()."
        raise bad_type("tokenizer", "must be a tokenizer of nosa_jax.hf", type(tokenizer).__name__, remedy)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """From drafts to prompts and their tokens."""

    tokenizer: Tokenizer
    template: ChatTemplate | None

    def prompt(self, draft: Draft) -> str:
        if self.template is None:
            return f"{draft.body}\n{draft.lead}"
        return self.template.render([{"role": "user", "content": draft.body}], prompt=True) + draft.lead

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Tokens of a prompt; plain: without any that the tokenizer adds."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.encode(text)
        return self.tokenizer.encode(text, add_special_tokens=self.template is None and not plain)

    def answer_ids(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """The tokens of the answer behind those of the prompt."""
        whole = self.encode(prompt + answer)
        if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
            return whole[len(prompt_ids) :]
        return self.encode(answer, plain=True)  # the tokens of the prompt change, or something is added at the end

    def places(self, prompt: str, prompt_ids: list[int], characters: list[int]) -> list[int]:
        """The tokens in which these characters of the prompt are."""
        if not characters:
            return []
        ((ids, spans),) = self.tokenizer.encode_spans([prompt])
        added = range(len(prompt_ids) - len(ids) + 1)
        before = next((n for n in added if prompt_ids[n : n + len(ids)] == list(ids)), 0)
        # Of several tokens that make up one character the first.
        return [before + int(np.searchsorted(spans[:, 1], at, side="right")) for at in characters]


def _example(
    task: Task, length: int, seed: int, index: int, options: dict[str, Any], haystack: Haystack | None, writer: _Writer
) -> Example:
    stream = [seed, zlib.crc32(task.name.encode()), length]
    offset = np.random.default_rng(stream).random()

    def draft_of(size: int) -> Draft:
        random = np.random.default_rng([*stream, index])
        return task.draft(Source(random, (offset + index * _GOLDEN) % 1, haystack, options), size)

    def tokens_of(size: int) -> int:
        draft = draft_of(size)
        return len(writer.encode(writer.prompt(draft))) + room_for(draft)

    def room_for(draft: Draft) -> int:
        return len(writer.encode(draft.answer, plain=True)) + SLACK

    size = largest(tokens_of, length)
    if size is None:
        rule = f"must hold the smallest example of {task.name}, {tokens_of(0)} tokens with room for the answer"
        raise bad_value("length", rule, length, "Raise it, or make the task easier.")
    draft = draft_of(size)
    prompt = writer.prompt(draft)
    ids = writer.encode(prompt)
    begin = max(prompt.find(draft.body), 0)
    return Example(
        task=task.name,
        length=length,
        seed=seed,
        index=index,
        difficulty=tuple(options.items()),
        prompt=prompt,
        prompt_ids=tuple(ids),
        answer=draft.answer,
        answer_ids=tuple(writer.answer_ids(prompt, ids, draft.answer)),
        wanted=draft.wanted,
        room=room_for(draft),
        needles=tuple(writer.places(prompt, ids, [begin + mark for mark in draft.marks])),
    )


def largest(cost: Callable[[int], int], budget: int) -> int | None:
    """About the largest size >= 0 whose cost is within the budget: nothing above it by more than 1/500 of the budget
    fits. None where not even 0 does.

    cost: of a size, which grows with it, steadily but for small steps. It is asked for about five times.
    """
    least = cost(0)
    if least > budget:
        return None
    low, spent, high = 0, least, None
    rate, guess = 1.0, 64
    for step in range(64):
        if high is not None:
            guess = min(max(guess, low + 1), high - 1)
        found = cost(guess)
        if found <= budget:
            low, spent = guess, found
        else:
            high = guess
        if (high is not None and high <= low + 1) or budget - spent <= budget // 500:
            break
        rate = max((found - least) / guess, 1e-3)
        aim = int((budget - least) / rate)
        # The straight line, and where that creeps, the middle.
        guess = max(aim, low + 1) if high is None else aim if step < 6 else (low + high) // 2
    return low
