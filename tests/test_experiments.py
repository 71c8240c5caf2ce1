"""Every experiment imports on a CPU and says what it is for; the command in its docstring is one that it takes."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = {
    ".".join(file.relative_to(FOLDER.parent).with_suffix("").parts): file
    for file in sorted(FOLDER.rglob("*.py"))
    if file.name != "__init__.py"
}
COMMANDS = [module for module, file in FILES.items() if "\ndef main(" in file.read_text(encoding="utf-8")]
# Nothing here may ask for these before it runs; drawing is what the figures' scripts are for.
OPTIONAL = ("torch", "fla", "triton", "transformers", "tyro", "grain", "tqdm", "safetensors", "tokenizers")
RESULTS = FOLDER / "README.md"


@pytest.mark.parametrize("module", FILES)
def test_imports_without_optional_packages(module, monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.import_module(module)


@pytest.mark.parametrize("module", COMMANDS)
def test_shows_its_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    experiment = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        experiment.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert experiment.__doc__.splitlines()[0] in shown

    commands = re.findall(rf"python -m {re.escape(module)}\b(.*)", experiment.__doc__)
    assert commands, "its docstring shows how it is run"
    for flag in re.findall(r"--[\w-]+", " ".join(commands)):
        assert re.search(rf"{flag}\b", shown.split(experiment.__doc__.rstrip())[-1]), f"{flag} is not in its --help"


def test_a_module_that_needs_a_gpu_says_so_before_any_work(monkeypatch, capsys):
    from experiments.environment import gpu_arguments

    monkeypatch.setattr(sys, "argv", ["it"])
    with pytest.raises(SystemExit) as end:
        gpu_arguments(argparse.ArgumentParser())
    assert end.value.code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("module", FILES)
def test_the_readme_lists_it(module):
    assert f"`{module.removeprefix('experiments.')}`" in RESULTS.read_text(), f"say in {RESULTS.name} what it is for"


def test_every_link_of_the_readme_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", RESULTS.read_text())
    for target in links:
        assert (FOLDER / target).exists(), target
    missing = {file.name for file in (FOLDER / "results").iterdir()} - {Path(target).name for target in links}
    assert not missing, "every result is linked"
