"""Kills a training run at random, again and again, and compares what comes of it with a run that was left alone.

    python -m experiments.kill_and_resume --output experiments/results/kill_and_resume_cpu.json
    python -m experiments.kill_and_resume --processes 2 --output experiments/results/kill_and_resume_2_cpu.json

A tiny model on devices of a CPU, checkpoints written in the background after every other step. Each time the run is
resumed, and after a random while all its processes get SIGKILL at once, also while files are being written; how often
that was so is counted by the unfinished folders that were left. It compares what the log and the checkpoints say at the
end: losses of every step, to the bit, and every parameter and moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.environment import save

ROOT = Path(__file__).parent.parent
STEPS, DEVICES = 24, 4

WORKER = """
import sys
import jax

index, count, port, folder, steps, devices = *map(int, sys.argv[1:4]), sys.argv[4], *map(int, sys.argv[5:7])
jax.config.update("jax_num_cpu_devices", devices // count)
from nosa_jax import parallel, presets, train

if count > 1:
    parallel.initialize(f"localhost:{port}", count, index)
config = train.TrainConfig(
    presets.tiny(), steps=steps, batch_size=8, length=128, log_every=1, eval_every=0, eval_batches=1,
    checkpoint_every=2, keep_checkpoints=3,
)
source = train.text(train.stdlib_files()[:12], length=128, block_size=16, progress=False)
mesh = parallel.make_mesh(data=2, fsdp=devices // 2)
train.train(config, source, folder, mesh=mesh, resume=True, progress=False)
"""


def start(folder: Path, processes: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [str(value) for value in (processes, port, folder, STEPS, DEVICES)]
    command = lambda index: [sys.executable, "-c", WORKER, str(index), *arguments]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT}
    return [subprocess.Popen(command(index), **quiet) for index in range(processes)]


def wait(running: list[subprocess.Popen[bytes]], seconds: float | None) -> bool:
    """Whether all ended well before so many seconds were over; else they are killed. Raises where one failed."""
    end = None if seconds is None else time.monotonic() + seconds
    while any(process.poll() is None for process in running):
        if end is not None and time.monotonic() > end:
            for process in running:
                if process.poll():  # it failed, and the others wait for it
                    raise RuntimeError(process.communicate()[1].decode()[-3000:])
            for process in running:
                process.send_signal(signal.SIGKILL)
            for process in running:
                process.communicate()
            return False
        time.sleep(0.02)
    for process in running:
        if process.returncode:
            raise RuntimeError(process.communicate()[1].decode()[-3000:])
    return True


def unfinished(folder: Path) -> set[tuple[str, int, int]]:
    """The folders of checkpoints that were being written when the run was killed."""
    found = [(path.name, path.stat()) for path in (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
    return {(name, stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def outcome(folder: Path) -> dict[str, Any]:
    """The last loss that the log has of every step, and a sum over the newest checkpoint's arrays."""
    import jax
    import numpy as np

    from nosa_jax import presets, train

    losses = {r["step"]: r["loss"] for r in train.read_log(folder / "log.jsonl") if r["kind"] == "train"}
    config = train.OptimizerConfig()
    like = jax.eval_shape(lambda: train.init_state(_model(presets.tiny()), config))
    with train.Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(like)
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()
        return {"losses": losses, "step": checkpoints.latest_step(), "digest": digest}


def _model(config: Any) -> Any:
    from flax import nnx

    from nosa_jax import NosaLM

    return NosaLM(config, rngs=nnx.Rngs(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="of one run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp())
    begin = time.monotonic()
    wait(start(folder / "alone", args.processes), None)
    whole = time.monotonic() - begin
    expected = outcome(folder / "alone")
    kills, hits, ended, wrong = [], 0, 0, 0
    killed = folder / "killed"
    while len(kills) < args.kills:
        # Most kills fall between the first step and the end; a run that was allowed to end begins anew.
        seconds = whole * random.uniform(0.4, 1.0)
        before = unfinished(killed)  # a run that is killed early leaves them as they are
        if wait(start(killed, args.processes), seconds):
            found = outcome(killed)
            ended += 1
            wrong += found != expected
            shutil.rmtree(killed)
        else:
            kills.append(round(seconds, 2))
            hits += bool(unfinished(killed) - before)
        print(f"{len(kills)} kills, {hits} in a write, {ended} ends, {wrong} of them different", flush=True)
    wait(start(killed, args.processes), None)
    ended, wrong = ended + 1, wrong + (outcome(killed) != expected)
    shutil.rmtree(folder)
    results = {"kills_after_seconds": kills, "kills_in_a_write": hits, "processes": args.processes}
    results |= {"runs_ended": ended, "runs_different": wrong}
    print(json.dumps(results))
    if args.output is not None:
        save(args.output, **results)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
