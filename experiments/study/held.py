"""Which text the study trains on and which it holds out: the source of the packages installed beside this one."""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from experiments.study import text
from experiments.study.arms import Size

HELD_OUT = 0.25
DOCUMENTS_PER_PACKAGE = 6
CHARACTERS = 800_000  # of each package


def study_text(size: Size, tokenizer: Any, kept: Path | None = None) -> text.Text:
    """The text at the size's length. kept: a file that holds it between runs, so that packages are read once."""
    if kept is not None and kept.exists():
        found: text.Text = pickle.loads(kept.read_bytes())
        return found
    found = text.packages_source(
        text.packages(), tokenizer, size.length, block_size=size.block_size, heldout_fraction=HELD_OUT,
        documents_per_package=DOCUMENTS_PER_PACKAGE, most_characters=CHARACTERS,
    )  # fmt: skip
    if kept is not None:
        partial = kept.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(found))
        partial.replace(kept)
    return found


def documents_of(held: text.Text, size: Size) -> Int32[np.ndarray, "N T"]:
    """Held-out documents, as many as the size asks for, spread over all there are."""
    rows = held.source.heldout_rows()
    chosen = np.linspace(0, len(rows) - 1, min(size.documents, len(rows))).round().astype(int)
    return np.stack([np.asarray(rows[int(n)].tokens, np.int32) for n in chosen])


def haystack() -> str:
    """Text of packages that are trained on, in which examples to learn tasks from hide what is asked for."""
    found = text.packages()
    names = [name for name in found if not text.is_held_out(name, HELD_OUT)]
    return "\n".join(text.joined(found[name])[:40_000] for name in names)[:2_000_000]


def describe(held: text.Text, size: Size) -> dict[str, Any]:
    """Which text it was."""
    versions = {}
    owners = importlib.metadata.packages_distributions()
    for name in text.packages():
        dists = sorted(set(owners.get(name, [])))  # which name one twice that was installed in two ways
        versions[name] = [f"{dist} {importlib.metadata.version(dist)}" for dist in dists]
    return {
        "packages": versions, "fingerprint": held.source.fingerprint(), "train_tokens": held.source.train_tokens,
        "documents": len(documents_of(held, size)), "of": len(held.heldout), "heldout": sorted(set(held.heldout)),
        "overlap_mean": float(np.mean(held.overlap)), "overlap_max": float(np.max(held.overlap)),
        "dropped": held.dropped,
    }  # fmt: skip
