"""Examples in module docstrings run as they stand.

The rule: an example is a run of lines that are indented by four spaces in a module's docstring, after an empty line.
One whose first word is a command of the shell is not run here (`test_experiments.py` looks at those of the
experiments); any other one is Python and runs in the names of its own module, of `nosa_jax` and of what a reader would
have at hand: `model`, a NosaLM, and `tokens`, int32 [2, 65]. Python outside of an example is an error: it would be
shown and not run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax

ROOT = Path(__file__).parents[1]
SHELL = ("pip", "python", "make", "nosa", "pytest")


def docstrings() -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of every module."""
    for top in ("pallas_kernels", "nosa_jax", "experiments"):
        for file in sorted((ROOT / top).rglob("*.py")):
            # As it stands: cleaned, one whose only lines are an example would lose its indent.
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False)
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), text or ""


def examples(docstring: str) -> list[str]:
    """Its indented blocks, empty lines inside of them included."""
    found = re.findall(r"(?<=\n\n)(?:    .*\n?|\n(?=    ))+", docstring + "\n")
    return [inspect.cleandoc("\n" + block) for block in found]


def is_python(line: str) -> bool:
    """Whether a line is a statement that does something: an import, an assignment or a call."""
    try:
        body = ast.parse(line.strip()).body
    except SyntaxError:
        return False
    does = (ast.Import, ast.ImportFrom, ast.Assign)
    return any(isinstance(node, does) or isinstance(getattr(node, "value", None), ast.Call) for node in body)


PYTHON = [
    (name, example)
    for name, docstring in docstrings()
    for example in examples(docstring)
    if example.split()[0] not in SHELL
]


@pytest.mark.slow
@pytest.mark.parametrize("name, example", PYTHON, ids=[name for name, _ in PYTHON])
def test_examples_run(name, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = vars(nosa_jax) | vars(importlib.import_module(name))
    names |= {"nosa_jax": nosa_jax, "model": lively_model(small_config()), "tokens": random_tokens(2, 65)}
    jaxtyping.config.update("jaxtyping_disable", True)  # as users run it
    try:
        exec(compile(example, f"docstring of {name}", "exec"), names)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_there_are_examples():
    assert {"nosa_jax.train", "nosa_jax.train.step", "nosa_jax.train.data"} <= {name for name, _ in PYTHON}


def test_python_is_shown_as_an_example():
    for name, docstring in docstrings():
        prose = [line for line in docstring.splitlines() if not line.startswith("    ")]
        assert not (lines := [line for line in prose if is_python(line)]), f"{name}: indent {lines} by four spaces"


def test_the_rule_of_examples():
    text = "Summary.\n\n    x = 1\n\n    y = 2\n\nProse:\n    a hanging line\n\n    pip install it\n"
    assert examples(text) == ["x = 1\n\ny = 2", "pip install it"]
    assert is_python("state = init(x)") and is_python("next(batches)  # so") and is_python("import this")
    assert not is_python("Needs the extra.") and not is_python("-1 padding") and not is_python("words")
