"""What is measured of a model: losses by position, and the locality of its selections."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float64, Int32

import nosa_jax
from experiments.study.arms import Size, with_bias
from nosa_jax import NosaLM, Selections, evals
from nosa_jax.locality.report import LocalityReport

PARTS = 16  # of a document, whose losses are kept apart


def losses(model: NosaLM, documents: Int32[np.ndarray, "N T"], batch_size: int = 4) -> Float64[np.ndarray, "N parts"]:
    """Mean negative log-likelihood in nats of the tokens in each part of each document, all parts equally long."""
    count, length = documents.shape
    found = []
    for begin in range(0, count, batch_size):
        rows = np.minimum(np.arange(begin, begin + batch_size), count - 1)  # full batches share a program
        found.append(np.asarray(evals.log_likelihood(model, documents[rows]), np.float64)[: count - begin])
    nats = -np.concatenate(found).reshape(count, PARTS, length // PARTS)
    tokens = np.full(PARTS, length // PARTS)
    tokens[0] -= 1  # nothing predicts the first token
    return nats.sum(-1) / tokens


def selections(model: NosaLM, documents: Int32[np.ndarray, "N T"], steps: int, label: str) -> Selections:
    """What the last `steps` tokens of each document select: the selections of decoding there, since reading and
    decoding select alike."""
    ids = np.concatenate([np.asarray(_selected(model, row[None], steps)) for row in documents], axis=1)
    length = documents.shape[1]
    positions = np.tile(np.arange(length - steps, length, dtype=np.int32), (len(documents), 1))
    config = model.config
    return Selections(ids.astype(np.int32), positions, config.attention, config.head_dim, 2, label)


@functools.partial(jax.jit, static_argnames="steps")
def _selected(model: NosaLM, tokens: Int32[Array, "B T"], steps: int) -> Int32[Array, "L B K steps J"]:
    return nosa_jax.forward(model, tokens, record=True, logits="last").block_ids[..., -steps:, :]


def locality_numbers(report: LocalityReport) -> dict[str, Any]:
    """Of all layers and KV heads: means of gamma and of blocks fetched per step, by slots, by LRU and the optimum, and
    bytes of a bfloat16 cache per token."""
    mean = lambda values: round(float(np.nanmean(values)), 5)
    return {
        "gamma": mean(report.gamma),
        "gamma_unforced": mean(report.gamma_unforced),
        "guaranteed_gamma": round(report.guaranteed_gamma, 5),
        "dense_share": mean(report.dense_share),
        "working_set": {str(window): mean(values) for window, values in report.working_set.items()},
        "misses": {str(slots): mean(values) for slots, values in report.misses.items()},
        "optimal_misses": {str(slots): mean(values) for slots, values in report.optimal_misses.items()},
        "bytes_per_token": {str(slots): round(report.bytes_per_token(slots)) for slots in report.misses},
        "blocks_in_all": -(-(int(report.positions.max()) + 1) // report.attention.block_size),
    }


def quality_and_locality(
    model: NosaLM, documents: Int32[np.ndarray, "N T"], size: Size, label: str
) -> tuple[dict[str, Any], Selections | None]:
    """Losses of all documents, and what some of them select, with its numbers: "locality" at their ends, "locality
    after N" where less of them is read. The selections are those at the ends."""
    found: dict[str, Any] = {"losses": as_list(losses(model, documents))}
    recorded = None
    if not model.config.attention.is_sparse:
        return found, recorded
    chosen = np.linspace(0, len(documents) - 1, size.measured).round().astype(int)
    for read in size.read:
        recorded = selections(model, documents[chosen, :read], size.decode_steps, label)
        found["locality" if read == size.length else f"locality after {read}"] = locality_numbers(recorded.report())
    return found, recorded


def without_exact_bias(model: NosaLM, documents: Int32[np.ndarray, "N T"]) -> dict[str, list[list[float]]]:
    """Losses of a model with importance where attention is without its bias, or has it scaled by 1 / sqrt(D)."""
    factors = {"none": 1e-6, "over sqrt(D)": model.config.head_dim**-0.5}
    return {name: as_list(losses(with_bias(model, factor), documents)) for name, factor in factors.items()}


def first_rows(recorded: Selections, rows: int) -> Selections:
    """The selections of the first rows alone."""
    return dataclasses.replace(
        recorded, block_ids=recorded.block_ids[:, :rows].copy(), positions=recorded.positions[:rows].copy()
    )


def as_list(values: Float64[np.ndarray, "N parts"]) -> list[list[float]]:
    return [[round(x, 5) for x in row] for row in values.tolist()]
