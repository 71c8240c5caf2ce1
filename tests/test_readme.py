"""The code of the README runs, as it stands and in its order."""

from __future__ import annotations

import re
from pathlib import Path

import jaxtyping
import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield tmp_path
    jaxtyping.config.update("jaxtyping_disable", False)


def test_python_blocks_run_in_order(elsewhere):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert (elsewhere / "my-model" / "model.safetensors").exists()


def test_every_local_link_and_picture_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 200
