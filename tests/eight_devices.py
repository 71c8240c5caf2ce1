"""Programs that run with eight devices of the CPU's own, beside tests that have one.

Such a program is a file of this folder that ends in `report(GROUPS)`. It computes the cases of one group and prints
what it found, for tests to judge. Starting and compiling is what costs: a group shares a process, and what it computes
on one device is computed once. By hand: JAX_NUM_CPU_DEVICES=8 python parallel_steps.py pairs
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nosa_jax import parallel
from nosa_jax._pytree import by_name


@functools.cache
def found(program: str, group: str, *, optimized: bool = False) -> dict[str, Any]:
    """What `tests/<program>.py` found in the cases of a group, by their names.

    optimized: whether its programs are compiled as users' are.
    """
    wanted = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if optimized:
        wanted["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    done = subprocess.run(
        [sys.executable, f"{program}.py", group],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | wanted,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def of_case(program: str, group: str, name: str, *, optimized: bool = False) -> Any:
    """What was found in one case; fails where it could not be computed."""
    finding = found(program, group, optimized=optimized)[name]
    assert "error" not in finding, finding["error"]
    return finding


def report(groups: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]]) -> None:
    """Prints what the function of a group, named on the command line, makes of each of its cases, a line for each."""
    cases, check = groups[sys.argv[1]]
    for name, case in cases.items():
        try:
            finding = check(case)
        except Exception:
            finding = {"error": traceback.format_exc()[-6000:]}
        print(json.dumps([name, finding]), flush=True)


def mesh_of(axes: dict[str, int], explicit: bool = False) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many as its axes take."""
    return parallel.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())], explicit=explicit)


def relative_errors(ours: Any, theirs: Any) -> dict[str, float]:
    """By name, the norm of the difference by the norm of what is right."""
    ours, theirs = by_name(ours), by_name(theirs)
    assert ours.keys() == theirs.keys()

    def error(ours: Any, theirs: Any) -> float:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        difference = float(np.linalg.norm(ours - theirs))
        return difference / float(np.linalg.norm(theirs)) if theirs.any() else difference

    return {name: error(ours[name], theirs[name]) for name in theirs}
