"""Small sources of training data, and the files that tests read them from."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import tokenizers

from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.source import Cut

TEXTS = [f"{letter}-{'xyz' * n}." for n, letter in enumerate("abcdefghij")]
WORDS = {"<s>": 0, "</s>": 1, "?": 2, "one": 3, "two": 4, "three": 5, "<end>": 6}


def write_lines(path, lines):
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_texts(folder):
    """TEXTS, a file each."""
    for n, text in enumerate(TEXTS):
        (folder / f"{n}.txt").write_text(text)
    return sorted(folder.glob("*.txt"))


def write_tokenizer(folder):
    """A folder with a tokenizer of words that puts <s> in front."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def made(count=300, size=5, length=8, first=0, *, pack=True, masked=False, heldout_fraction=0.0):
    """A source of `count` documents of the ids from `first` on. (With few rows grain takes long to shuffle them.)"""
    ids = first + np.arange(count * size)
    tokens = Tokens([ids], [ids % 2 == 0] if masked else None)
    starts = size * np.arange(count)
    cut = Cut(length, pack, 4 if pack else 1, heldout_fraction)
    spans = np.stack([starts, starts + size], axis=1)
    return cut.source(tokens, spans, bytes_per_token=1.0, vocab_size=tokens.vocab_size)


def documents(batches):
    """The documents, or their pieces, in packed batches, as lists of ids."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            found += [tokens[segments == n].tolist() for n in range(segments.max() + 1)]
    return found


def read(source):
    """All documents, trained on or held out."""
    epoch = itertools.islice(source.batches(1), len(source.train_rows(0).parents[0]))
    return documents([*epoch, *source.heldout(1)])
