"""Tasks in the study: examples, tuning a model on others like them, and its answers.

A model that was continued on source code knows little of lists of records. So before it is asked it is tuned, shortly,
on examples of most tasks: in the form of a chat where questions come without one, with things hidden in other text,
and never on `UNSEEN`.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.study.arms import Arm, Size, completed, training
from experiments.study.held import haystack
from nosa_jax import NosaLM, evals, train
from nosa_jax.evals.examples import Example, Tokenizer

UNSEEN = "variable_tracking"
# How many examples to learn from there are of each task, by their tokens: most of them short, so that many fit a row.
TAUGHT = {512: 60, 1024: 60, 2048: 40, 4096: 30, 7680: 20}
TAUGHT_SEED = 1  # questions have 0

Made = tuple[str, int, int, int, str | None]  # task, tokens, count, seed, text to hide things in


def _make(tokenizer: Tokenizer, wanted: Made) -> list[Example]:
    """Examples, in a process of their own."""
    task, length, count, seed, hay = wanted
    return evals.make(task, length, tokenizer, count, seed, haystack=hay if evals.TASKS[task].hides else None)


def made(tokenizer: Tokenizer, wanted: list[Made]) -> Iterator[list[Example]]:
    """Examples of each entry, made by several processes."""
    context = multiprocessing.get_context("spawn")
    workers = min(len(wanted), 16, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_make, [tokenizer] * len(wanted), wanted)


def questions(tokenizer: Tokenizer, size: Size) -> list[list[Example]]:
    """The examples that models are asked, by task and length."""
    wanted: list[Made] = [
        (task, length, size.task_count, 0, None) for task in size.tasks for length in size.task_lengths
    ]
    return list(made(tokenizer, wanted)) if wanted else []


def lessons(tokenizer: Tokenizer, folder: Path, size: Size, file: Path) -> train.Source:
    """What models are tuned on: conversations, in a JSON-lines file that is written where it is not there.

    folder: of the model, with its chat template.
    """
    if not file.exists():
        hay = haystack()
        wanted: list[Made] = [
            (task, length, count, TAUGHT_SEED, hay)
            for task in size.tasks
            if task != UNSEEN
            for length, count in TAUGHT.items()
        ]
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as out:
            for examples in made(tokenizer, wanted):
                out.writelines(json.dumps({"messages": conversation(example)}) + "\n" for example in examples)
        partial.replace(file)
    return train.chat([file], folder, size.length, block_size=size.block_size, progress=False)


def conversation(example: Example) -> list[dict[str, str]]:
    """An example as a chat. The last line of its prompt is the begin of the answer."""
    body, _, lead = example.prompt.rpartition("\n")
    return [{"role": "user", "content": body}, {"role": "assistant", "content": f"{lead}{example.answer}."}]


def tuned(model: NosaLM, arm: Arm, seed: int, source: train.Source, size: Size) -> NosaLM:
    """The model after tuning. Raises KeyboardInterrupt where that was ended."""
    run = training(arm, size, model, seed, steps=size.tuning_steps)
    return completed(run, source, model=model).model


def answers(model: NosaLM, asked: list[list[Example]]) -> list[dict[str, Any]]:
    """By task and length: how many answers greedy decoding would give to the letter, how many of their tokens are the
    likeliest at their place behind the right ones, and how likely they are, in nats per token.

    Greedy decoding gives an answer just if every token of it is the likeliest after the right ones before.
    """
    found = []
    for examples in asked:
        forced = evals.score_answers(model, examples)
        tokens = sum(one.tokens for one in forced)
        found.append({
            "task": examples[0].task, "length": examples[0].length, "count": len(examples),
            "exact": sum(one.is_exact for one in forced) / len(examples),
            "tokens": round(sum(one.greedy for one in forced) / tokens, 4),
            "log_likelihood": round(sum(one.log_likelihood for one in forced) / tokens, 4),
        })  # fmt: skip
    return found
