"""500 loads of a folder that another process replaces all the time: `python tests/hf_readers.py FOLDER` counts them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from hf_folders import make_model

from nosa_jax.hf import from_pretrained, save_pretrained


def write(folder: Path) -> None:
    random, models = np.random.default_rng(0), [make_model()]
    models.append(jax.tree.map(lambda x: -x, models[0]))
    while True:
        shard = int(random.choice([9000, 2**30]))
        save_pretrained(models[int(random.integers(2))], folder, max_shard_bytes=shard)
        time.sleep(random.uniform(0, 0.03))


def read(folder: Path, loads: int = 500) -> dict[str, int]:
    """How many loads gave the one model, the other, a mixture of both, and an error that says the folder is in use."""
    known = [np.asarray(x) for x in jax.tree.leaves(make_model())]
    save_pretrained(make_model(), folder)
    skeleton = nnx.eval_shape(make_model)
    nnx.eval_shape = lambda _: jax.tree.map(lambda x: x, skeleton)  # most of the time of so small a load
    found = dict.fromkeys(("plus", "minus", "mixed", "refused"), 0)
    writer = subprocess.Popen([sys.executable, __file__, folder, "write"])
    try:
        while found["minus"] == 0 or sum(found.values()) < loads:
            assert writer.poll() is None
            try:
                leaves = [np.asarray(x) for x in jax.tree.leaves(from_pretrained(folder))]
            except ValueError as error:
                assert "must stay as it is" in str(error)
                found["refused"] += 1
                continue
            signs = {np.array_equal(leaf, x) - np.array_equal(leaf, -x) for leaf, x in zip(leaves, known, strict=True)}
            kind = {(1,): "plus", (-1,): "minus"}.get(tuple(signs), "mixed")
            if found["minus"] == 0 and kind == "plus":
                time.sleep(0.02)  # the writer is yet to begin
                continue
            found[kind] += 1
    finally:
        writer.kill()
        writer.wait()
    return found


if __name__ == "__main__":
    if len(sys.argv) > 2:
        write(Path(sys.argv[1]))
    print(json.dumps(read(Path(sys.argv[1]))))
