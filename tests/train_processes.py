"""One process of a run that several share; prints its losses and how it ended.

    python train_processes.py INDEX COUNT PORT FOLDER AXES STEPS VARIANT TROUBLE

COUNT processes have 4 devices together. AXES is a mesh as `nosa train --mesh` takes it. TROUBLE is "none" or what comes
in the third step: the first process cannot "write" its log, the last one cannot "read" or gets a "signal"; or "nan":
no loss is finite; or "save": the last process hears after the second step that its part of a checkpoint is missing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from support import small_config

import nosa_jax
from nosa_jax import parallel, train
from nosa_jax.cli.train import as_sizes
from nosa_jax.train.feed import Feed

LENGTH = 192  # with more blocks than a sparse variant selects


def troubled(feed_next: Any, trouble: str, stop: bool) -> Any:
    """`Feed.__next__`, with what happens to the last process when it reads the third batch."""
    calls = itertools.count(1)

    def following(feed: Feed) -> Any:
        if stop and next(calls) == 3:
            if trouble == "read":
                raise OSError("no more text")
            os.kill(os.getpid(), signal.SIGTERM)
        return feed_next(feed)

    return following


def unsaved(wait: Any) -> Any:
    """Orbax's `wait_until_finished`, which tells once of an error with the first checkpoint."""
    told: list[bool] = []

    def waiting(manager: Any) -> None:
        wait(manager)
        if not told and manager.latest_step() == 2:
            told.append(True)
            raise OSError("no more room")

    return waiting


def full_disk(record: dict[str, Any]) -> None:
    if record["kind"] == "train" and record["step"] == 3:
        raise OSError("No space left on device")


def main(index: int, count: int, port: int, folder: str, axes: str, steps: int, variant: Any, trouble: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // count)
    jax.config.update("jax_default_matmul_precision", "highest")
    if count > 1:
        parallel.initialize(f"localhost:{port}", count, index)
    if trouble == "early signal":
        os.kill(os.getpid(), signal.SIGTERM)
    model = dataclasses.replace(small_config().with_attention(variant=variant), vocab_size=256)
    config = train.TrainConfig(
        model,
        steps=steps,
        batch_size=8,
        length=LENGTH,
        log_every=1,
        eval_every=3,
        eval_batches=2,
        checkpoint_every=2,
        max_skipped=2,
    )
    block = model.attention.block_size
    source = train.text(train.stdlib_files()[:6], length=LENGTH, block_size=block, progress=False)
    mesh = parallel.make_mesh(**as_sizes(axes))
    options: dict[str, Any] = {"on_record": full_disk} if trouble == "write" else {}
    if trouble == "nan":
        options = {"loss": lambda model, batch: jax.numpy.nan * model.norm[...].sum()}
    if trouble in ("read", "signal"):
        Feed.__next__ = troubled(Feed.__next__, trouble, index == count - 1)
    if trouble == "save" and index == count - 1:
        manager: Any = ocp.CheckpointManager
        manager.wait_until_finished = unsaved(manager.wait_until_finished)
    result = train.train(config, source, folder, mesh=mesh, resume=True, progress=False, **options)
    nosa_jax.save_pretrained(result.model, f"{folder}/model")
    said = {"train": [r["loss"] for r in result.history], "eval": [r["loss"] for r in result.evaluations]}
    print(json.dumps({**said, "step": result.step, "interrupted": result.interrupted}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:6], int(sys.argv[6]), *sys.argv[7:9])
