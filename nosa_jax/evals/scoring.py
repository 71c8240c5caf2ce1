"""What a model makes of examples: the probability that it gives to the answer, and what it answers itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from nosa_jax.config import CacheConfig
from nosa_jax.decode import generate
from nosa_jax.evals.batches import like_lengths, rows_for, stacked
from nosa_jax.evals.examples import Example, Tokenizer
from nosa_jax.evals.likelihood import CHUNK, score_tokens
from nosa_jax.model import NosaLM

Advance = Callable[[int], object]  # is told how many examples are done
_NOBODY: Advance = lambda done: None
_LEAST_ROOM = 32  # tokens


@dataclasses.dataclass(frozen=True)
class Forced:
    """How a model reads an answer that is put in front of it (teacher forcing).

    log_likelihood: nats, the sum over the tokens of the answer.
    tokens: how many these are.
    greedy: how many of them were the likeliest token at their place.
    """

    log_likelihood: float
    tokens: int
    greedy: int

    @property
    def is_exact(self) -> bool:
        """Whether greedy decoding would have given the answer as it stands."""
        return self.greedy == self.tokens


def score_answers(
    model: NosaLM,
    examples: Sequence[Example],
    *,
    batch_size: int | None = None,
    chunk: int = CHUNK,
    advance: Advance = _NOBODY,
) -> list[Forced]:
    """Reads each prompt with its answer behind it, whole rows without a cache.

    batch_size: examples that are read together; None for at most 16 and 65536 tokens.
    chunk: see `log_likelihood`.
    advance: is called with the number of examples of each batch that is done.
    """
    rows = [[*example.prompt_ids, *example.answer_ids] for example in examples]
    begins = [len(example.prompt_ids) for example in examples]
    # As wide as the examples may be, so that all tasks of a length share a program.
    width = max((example.length for example in examples), default=1)
    batch = rows_for(width, batch_size)
    found = score_rows(model, rows, begins, batch_size=batch, width=width, chunk=chunk, advance=advance)
    return [
        Forced(total, len(row) - begin, hits) for (total, hits), row, begin in zip(found, rows, begins, strict=True)
    ]


def score_rows(
    model: NosaLM,
    rows: Sequence[Sequence[int]],
    begins: Sequence[int],
    *,
    batch_size: int | None = None,
    width: int = 1,
    chunk: int = CHUNK,
    advance: Advance = _NOBODY,
) -> list[tuple[float, int]]:
    """Of each row of token ids the log-likelihood in nats of its tokens from `begins` on, and how many of these were
    the likeliest at their place.

    width: what rows are padded to at least. The other arguments: see `score_answers`.
    """
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    sizes = [len(row) for row in rows]
    for group in like_lengths(sizes, batch_size):
        batch = min(rows_for(sizes[group[0]], batch_size), len(rows))
        scores = score_tokens(model, *stacked([rows[number] for number in group], batch, width), chunk=chunk)
        likely, greedy = np.asarray(scores.log_likelihood, np.float64), np.asarray(scores.greedy)
        for place, number in enumerate(group):
            part = slice(begins[number], sizes[number])
            found[number] = (float(likely[place, part].sum()), int(greedy[place, part].sum()))
        advance(len(group))
    return found


def answer(
    model: NosaLM,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    cache: CacheConfig = CacheConfig(),
    batch_size: int | None = None,
    stop_tokens: Iterable[int] | None = None,
    prefill_chunk: int | None = None,
    dense: bool = False,
    advance: Advance = _NOBODY,
) -> list[str]:
    """What the model says after each prompt, by greedy decoding: at most the example's `room` tokens.

    cache: where the KV cache lives while decoding, see `CacheConfig`.
    stop_tokens: tokens that end an answer; None for `model.stop_tokens`.
    batch_size, advance: see `score_answers`. prefill_chunk, dense: `chunk` and
        `dense` of `nosa_jax.generate`.
    """
    stops = tuple(model.stop_tokens if stop_tokens is None else stop_tokens)
    texts = [""] * len(examples)
    # One of few widths and rooms, so that tasks of a length share programs.
    width = max((example.length for example in examples), default=1)
    room = max(_LEAST_ROOM, 1 << (max((example.room for example in examples), default=1) - 1).bit_length())
    rows = min(rows_for(width, batch_size), len(examples))
    for group in like_lengths([len(example.prompt_ids) for example in examples], rows):
        tokens, lengths = stacked([examples[number].prompt_ids for number in group], rows, width)
        found = generate(
            model,
            tokens,
            lengths,
            max_new_tokens=room,
            cache=cache,
            stop_tokens=stops,
            chunk=prefill_chunk,
            dense=dense,
        )
        new, counts = np.asarray(found.tokens), np.asarray(found.lengths)
        for place, number in enumerate(group):
            ids = new[place, : min(counts[place], examples[number].room)].tolist()
            texts[number] = tokenizer.decode(ids[:-1] if ids and ids[-1] in stops else ids)
        advance(len(group))
    return texts
