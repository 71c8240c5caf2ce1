"""How many tokens per second one core reads, packs and batches, against what a GPU trains on.

    python -m experiments.input_pipeline --output experiments/results/input_pipeline_cpu.json

The process keeps to one core. Sources: shards of made-up token ids (documents of log-normal lengths, mean 800), the
text of Python's standard library as bytes, conversations, and a mixture; packed and in windows. Each is made, then
batches are drawn for a few seconds, after one that is not timed. What it takes is held against five times the 25,000
tokens/s that a 1B model trains on with one H100. Writes JSON. Runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.environment import save
from nosa_jax import train

WANTED = 5 * 25_000  # tokens/s
END = 2  # of a document
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"


def write_shards(folder: Path, tokens: int, shards: int) -> list[Path]:
    random, files = np.random.default_rng(0), []
    for number in range(shards):
        ids = random.integers(3, 50_000, tokens // shards, np.uint16)
        ends = np.cumsum(random.lognormal(6.2, 1.0, len(ids) // 200).astype(np.int64) + 1)
        ids[ends[ends < len(ids)]] = END
        files.append(folder / f"{number}.npy")
        np.save(files[-1], ids)
    return files


def write_chats(folder: Path, chats: int) -> list[Path]:
    random, file = np.random.default_rng(0), folder / "chats.jsonl"
    text = lambda: "".join(map(chr, random.integers(97, 123, int(random.lognormal(5.5, 0.8)) + 1)))
    turns = lambda: [{"role": role, "content": text()} for role in ("user", "assistant") * random.integers(1, 5)]
    file.write_text("".join(json.dumps({"messages": turns()}) + "\n" for _ in range(chats)))
    return [file]


def measure(name: str, make: Callable[[], Any], batch_size: int, seconds: float) -> dict[str, Any]:
    begin = time.perf_counter()
    source = make()
    made = time.perf_counter() - begin
    tokens = source.train_tokens + source.heldout_tokens
    batches = source.batches(batch_size)
    shown = [next(batches) for _ in range(8)]
    drawn, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        next(batches)
        drawn += 1
    rate = drawn * batch_size * source.length / spent
    text = [1.0 if batch.segment_ids is None else float((batch.segment_ids >= 0).mean()) for batch in shown]
    return {
        "source": name,
        "tokens": tokens,
        "made_in_s": round(made, 2),
        "tokens_per_second_made": round(tokens / made),
        "tokens_per_second_in_batches": round(rate),
        "times_wanted": round(rate / WANTED, 1),
        "share_of_rows_that_is_text": round(float(np.mean(text)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in the shards (default: %(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="that batches are drawn for (default: %(default)s)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.filterwarnings("ignore", "skipped .* empty")  # files of the standard library
    results = []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), args.tokens, shards=4)
        chats = write_chats(Path(folder), chats=20_000)
        stdlib = train.stdlib_files()
        of_shards = lambda pack: train.tokens(shards, args.length, pack, end_of_document=END)
        of_text = lambda pack: train.text(stdlib, None, args.length, pack)
        sources = {
            "shards, packed": lambda: of_shards(True),
            "shards, windows": lambda: of_shards(False),
            "bytes of text, packed": lambda: of_text(True),
            "bytes of text, windows": lambda: of_text(False),
            "chats in bytes, packed": lambda: train.chat(chats, None, args.length, template=TEMPLATE),
            "mixture of shards and text, packed": lambda: train.mixture([(of_shards(True), 3), (of_text(True), 1)]),
        }
        for name, make in sources.items():
            results.append(measure(name, make, args.batch_size, args.seconds))
            print(json.dumps(results[-1]), flush=True)
    save(args.output, length=args.length, batch_size=args.batch_size, wanted=WANTED, sources=results)


if __name__ == "__main__":
    main()
