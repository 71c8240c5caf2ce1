"""Examples of some tasks at some lengths, answered by a model, as one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from nosa_jax.cache.plan import plan
from nosa_jax.config import CacheConfig
from nosa_jax.evals.chats import TemplateLike, as_template
from nosa_jax.evals.examples import Example, Tokenizer, find_task, make, require_tokenizer
from nosa_jax.evals.likelihood import CHUNK
from nosa_jax.evals.metrics import METRICS
from nosa_jax.evals.scoring import Forced, answer, score_answers
from nosa_jax.evals.table import Table
from nosa_jax.evals.tasks import Haystack
from nosa_jax.model import NosaLM
from nosa_jax.train.data.tokenize import progress_bar
from pallas_kernels.checks import bad_type, bad_value, require_bool, require_int, require_one_of, require_type


def evaluate(
    model: NosaLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = ("niah_single", "mqar"),
    lengths: Sequence[int] = (1024, 4096),
    count: int = 50,
    seed: int = 0,
    *,
    generation: bool = True,
    teacher_forcing: bool | None = None,
    prefill: Literal["sparse", "dense"] = "sparse",
    cache: CacheConfig = CacheConfig(),
    batch_size: int | None = None,
    chunk: int = CHUNK,
    prefill_chunk: int | None = None,
    stop_tokens: Iterable[int] | None = None,
    haystack: str | Haystack | None = None,
    chat: bool = False,
    template: TemplateLike = None,
    difficulty: Mapping[str, Mapping[str, Any]] | None = None,
    label: str | None = None,
    progress: bool = True,
    told: Callable[[Table], object] | None = None,
) -> Table:
    """Lets a model answer examples of tasks, and scores its answers.

    model: of any variant.
    tokenizer: the model's, see `nosa_jax.hf.load_tokenizer`.
    tasks: names in `TASKS`.
    lengths: tokens of prompt and answer together.
    count: examples of each task and length.
    seed: of the examples, see `make`.
    generation: whether the model answers by greedy decoding, see `answer`.
    teacher_forcing: whether the probability of the right answer is measured, see `score_answers`; None for yes, but
        where prompts are read dense, or by a policy: it reads them as the variant attends, without a cache.
    prefill: how prompts are read before an answer is generated: as the variant attends, or "dense", see
        `nosa_jax.prefill`.
    cache: where the KV cache lives while decoding.
    batch_size: examples that are read together; None for at most 16 and 65536 tokens.
    chunk: of teacher forcing, see `log_likelihood`. prefill_chunk: tokens of a prompt that are read at once before
        decoding; None for all.
    stop_tokens: tokens that end an answer; None for `model.stop_tokens`.
    haystack, chat: see `make`.
    template: see `make`; None for the one that the model came with.
    difficulty: options by task, such as {"niah_multikey": {"keys": 16}}.
    label: of the table, which names the cache's policy behind it; None for the model's variant.
    progress: whether a bar is shown on a terminal.
    told: called with the table so far whenever a task is done at a length, to save it, for example.

    Raises TypeError or ValueError, before the model runs, for bad input, a length too short for a task included;
    CacheTooLargeError where a batch does not fit.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    require_tokenizer(tokenizer)
    names, sizes = _several("tasks", tasks), _several("lengths", lengths)
    count, chunk = require_int("count", count, 1), require_int("chunk", chunk, 1)
    batch_size = None if batch_size is None else require_int("batch_size", batch_size, 1)
    require_type("cache", cache, CacheConfig, "Pass CacheConfig(...).")
    require_one_of("prefill", prefill, ("sparse", "dense"))
    dense = prefill == "dense"
    without = 'prefill="dense"' if dense else None if cache.policy is None else "a policy"
    teacher_forcing = without is None if teacher_forcing is None else require_bool("teacher_forcing", teacher_forcing)
    if without and teacher_forcing:
        raise bad_value("teacher_forcing", f"must be False with {without}", True, "Leave it out.")
    if not (require_bool("generation", generation) or teacher_forcing):
        raise bad_value("generation", "or teacher_forcing must be True", False, "Ask for one of them.")
    options = _options(difficulty, names)
    if generation:  # says so early where a policy does not go with the model
        longest = max(require_int("lengths", size, 1) for size in sizes)
        plan(model.config, 1, longest, cache, dtype=model.embed.dtype, prompt=longest, chunk=prefill_chunk, new=1)
    template = as_template(template, model.origin.files) if require_bool("chat", chat) else None
    haystack = haystack if haystack is None or isinstance(haystack, Haystack) else Haystack(haystack)
    of = lambda task, length, count: make(
        task, length, tokenizer, count, seed, haystack=haystack, chat=chat, template=template, **options[task]
    )
    for task in names:
        for length in sizes:
            of(task, length, 1)  # says so early where one cannot be
    settings = {
        "seed": seed,
        "count": count,
        "chat": chat,
        "prefill": prefill if cache.policy is None else "dense",
        "variant": model.config.attention.variant,
        "cache": dataclasses.asdict(cache) | {"policy": None if cache.policy is None else repr(cache.policy)},
        "difficulty": options,
    }
    label = model.config.attention.variant if label is None else label
    if cache.policy is not None:
        label = f"{label}, {type(cache.policy).__name__}"
    table = Table(label, [], [], settings)
    passes = int(generation) + int(teacher_forcing)
    with progress_bar("evaluating", total=len(names) * len(sizes) * count * passes, unit="", shown=progress) as bar:
        for task in names:
            for length in sizes:
                bar.set_postfix_str(f"{task}, {length}")
                made, advance = of(task, length, count), bar.update
                outputs = forced = None
                if teacher_forcing:
                    forced = score_answers(model, made, batch_size=batch_size, chunk=chunk, advance=advance)
                if generation:
                    outputs = answer(
                        model, tokenizer, made, cache=cache, batch_size=batch_size, stop_tokens=stop_tokens,
                        prefill_chunk=prefill_chunk, dense=dense, advance=advance,
                    )  # fmt: skip
                found = judge(made, outputs, forced)
                row = summarize(made, found, forced)
                table = dataclasses.replace(table, rows=[*table.rows, row], examples=[*table.examples, *found])
                if told is not None:
                    told(table)
    return table


def judge(
    examples: Sequence[Example], outputs: Sequence[str] | None, forced: Sequence[Forced] | None
) -> list[dict[str, Any]]:
    """One dict for each example, see `Table.examples`.

    outputs: what the model said to each. forced: how it read the answers. None where that was not measured.
    """
    found = []
    for number, example in enumerate(examples):
        metric = METRICS[find_task(example.task).metric]
        read = None if forced is None else forced[number]
        found.append(
            {
                "task": example.task,
                "length": example.length,
                "index": example.index,
                "depths": list(example.depths),
                "answer": example.answer,
                "output": None if outputs is None else outputs[number],
                "score": None if outputs is None else metric(outputs[number], example.wanted),
                "log_likelihood": None if read is None else read.log_likelihood,
                "forced_exact": None if read is None else read.is_exact,
            }
        )
    return found


def summarize(
    examples: Sequence[Example], judged: Sequence[Mapping[str, Any]], forced: Sequence[Forced] | None
) -> dict[str, Any]:
    """One row of a table from examples of one task and length, see `Table.rows`."""
    first, count = examples[0], len(examples)
    scores = [one["score"] for one in judged if one["score"] is not None]
    row: dict[str, Any] = {
        "task": first.task,
        "length": first.length,
        "count": count,
        "metric": find_task(first.task).metric,
        "score": float(np.mean(scores)) if scores else None,
        "stderr": float(np.std(scores, ddof=1)) / math.sqrt(count) if len(scores) > 1 else None,
    }
    names = ("forced_exact", "forced_tokens", "log_likelihood", "log_likelihood_per_token")
    if forced is None:
        return row | dict.fromkeys(names)
    tokens = sum(one.tokens for one in forced)
    total = math.fsum(one.log_likelihood for one in forced)
    exact, greedy = sum(one.is_exact for one in forced), sum(one.greedy for one in forced)
    return row | dict(zip(names, (exact / count, greedy / tokens, total / count, total / tokens), strict=True))


def _several(name: str, values: Any) -> list[Any]:
    """The values, each once; they are checked where they are used. Raises for a text, which is one, and for none."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise bad_type(name, "must be a sequence", f"{values!r:.60}", f"Pass {name}=({values!r:.60},).")
    found = list(dict.fromkeys(values))
    if not found:
        raise bad_value(name, "must not be empty", "()", "Name at least one.")
    return found


def _options(difficulty: Mapping[str, Mapping[str, Any]] | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A value for every option of each task, checked."""
    kinds = {name: find_task(name) for name in names}
    for name in difficulty or {}:
        if name not in kinds:
            raise bad_value("difficulty", f"must be by tasks that are asked for, {names}", repr(name), "Drop it.")
    return {name: kind.checked((difficulty or {}).get(name, {})) for name, kind in kinds.items()}
