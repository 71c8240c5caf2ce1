"""One process of a run that several share; prints its losses.

    python train_processes.py INDEX COUNT PORT FOLDER AXES STEPS

COUNT processes have 4 devices together. AXES is a mesh as `nosa train --mesh` takes it.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
from support import small_config

import nosa_jax
from nosa_jax import parallel, train
from nosa_jax.cli.train import as_sizes


def main(index: int, count: int, port: int, folder: str, axes: str, steps: int) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // count)
    jax.config.update("jax_default_matmul_precision", "highest")
    if count > 1:
        parallel.initialize(f"localhost:{port}", count, index)
    model = dataclasses.replace(small_config().with_attention(variant="full"), vocab_size=256)
    config = train.TrainConfig(
        model, steps=steps, batch_size=8, length=64, log_every=1, eval_every=3, eval_batches=2, checkpoint_every=2
    )
    block = model.attention.block_size
    source = train.text(train.stdlib_files()[:6], length=64, block_size=block, progress=False)
    mesh = parallel.make_mesh(**as_sizes(axes))
    result = train.train(config, source, folder, mesh=mesh, resume=True, progress=False)
    nosa_jax.save_pretrained(result.model, f"{folder}/model")
    losses = {"train": [r["loss"] for r in result.history], "eval": [r["loss"] for r in result.evaluations]}
    print(json.dumps(losses))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:6], int(sys.argv[6]))
