"""The code of the README runs, as it stands and in its order."""

from __future__ import annotations

import operator
import re
import shlex
from pathlib import Path

import jaxtyping
import pytest

import nosa_jax
from nosa_jax.cli.app import _parse
from nosa_jax.cli.train import Train

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield tmp_path
    jaxtyping.config.update("jaxtyping_disable", False)


BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_public_name_in_it_exists():
    names = {name for block in BLOCKS for name in re.findall(r"\bnosa_jax((?:\.\w+)+)", block)}
    assert len(names) >= 10
    for name in names:
        assert operator.attrgetter(name.removeprefix("."))(nosa_jax), name


def test_every_command_in_it_parses():
    """What they do is not run here; flags that contradict each other are seen."""
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL))
    lines = re.findall(r"\bnosa ([a-z].*?)(?:&.*)?$", re.sub(r"#.*", "", shell), flags=re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        command = _parse(shlex.split(line.replace("$i", "0")))
        if isinstance(command, Train):
            command._check()


@pytest.mark.slow
def test_python_blocks_run_in_order(elsewhere):
    assert len(BLOCKS) >= 3
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert (elsewhere / "my-model" / "model.safetensors").exists()


def test_every_local_link_and_picture_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 200
