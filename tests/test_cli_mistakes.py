"""What `nosa` says to mistakes that need no checkpoint, to missing packages and to an interrupt."""

from __future__ import annotations

import re
import sys

import pytest
from cli_checks import fails

import nosa_jax
from nosa_jax._extras import EXTRAS, Extra, require_extras
from nosa_jax.cli import main
from nosa_jax.cli.app import TRACEBACK_VARIABLE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "path: must be a local checkpoint folder"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "-1"], "--temperature: must be >= 0.0 and finite"),
        (["generate", "nowhere", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: must be >= 1"),
        (
            ["generate", "nowhere", "--prompt", "x", "--no-offload", "--slots", "9"],
            "--slots: has a meaning only with --offload, got",
        ),
        (["eval", "nowhere", "--tasks", "needle"], "--tasks: must be one of niah_single, "),
        (["eval", "nowhere", "--count", "0"], "--count: must be >= 1"),
        (["eval", "nowhere", "--no-offload", "--slots", "9"], "--slots: has a meaning only with --offload, got"),
        (["plan", "--slots", "3"], "--slots: must hold one selection"),
        (["plan", "--policy", "arkvale", "--slots", "80"], "--slots: has no meaning with a policy"),
        *(
            ([*command, "--policy", "arkvale", "--variant", "nosa"], "--variant: must be full beside --policy")
            for command in (["plan"], ["generate", "x", "--prompt", "y"], ["eval", "x"])
        ),
        (["plan", "--policy", "arkvale", "--misses", "33"], "--misses: must lie between 0.0 and 32"),
        (["plan", "--misses", "65"], "--misses: must lie between 0.0 and 64"),
        (
            ["plan", "--policy", "arkvale", "--policy-settings", "chunk=8"],
            "--policy-settings: must be settings of arkvale, which has page, ",
        ),
        (["plan", "--policy-settings", "chunk=8"], "--policy-settings: must go with --policy"),
        (
            ["generate", "x", "--policy", "shadowkv", "--policy-settings", "chunk=x8"],
            "--policy-settings: must be NAME=NUMBER, got 'chunk=x8'",
        ),
        (
            ["plan", "--policy", "shadowkv", "--policy-settings", "rank=4", "rank=8"],
            "--policy-settings: must name a setting once",
        ),
        (["plan", "--policy", "shadowkv", "--policy-settings", "chunk = -8"], "ShadowKV.chunk: must be >= 1"),
        *(
            ([command, "x", "--policy", "arkvale", "--chunk", "64"], "--chunk: must not go with --policy")
            for command in ("generate", "eval")
        ),
        (["eval", "x", "--no-generation", "--policy", "arkvale"], "--no-generation: must not go with --policy or"),
        (["eval", "x", "--no-generation", "--prefill", "dense"], "--no-generation: must not go with --policy or"),
        (["plan", "--batch", "0"], "--batch: must be a whole number >= 1"),
        (["train", "--files", "nowhere/*.txt"], "--files: must each find a file"),
        (["train", "--learning-rate", "3"], "--learning-rate: must lie between"),
        (["locality", "nowhere", "--variants", "full"], "--variants: must name methods that select blocks"),
        (["locality", "nowhere", "--new-tokens", "1"], "--new-tokens: must be >= 2"),
        (["demo", "--slots", "4"], "--slots: must hold one selection"),
        (["demo", "--new-tokens", "0"], "--new-tokens: must be >= 2"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails(arguments, capsys).startswith(message)


def test_arguments_that_do_not_parse_exit_with_2(capsys):
    for arguments in (["plan", "--preset", "nosa_9b"], ["dmeo"], ["generate"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "nosa_9b" in capsys.readouterr().err


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "train", "generate", "locality", "plan", "doctor", "--version"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nosa-jax {nosa_jax.__version__}\n"


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="must hold one selection"):
        main(["plan", "--slots", "3"])


def test_missing_packages_are_named_with_their_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert fails(["plan"], capsys) == (
        'tyro is needed for the command line: pip install "nosa-jax[cli]", or pip install ".[cli]" in a checkout'
    )
    monkeypatch.undo()
    monkeypatch.setitem(EXTRAS, "plots", Extra("figures", ("no_such_module",)))
    monkeypatch.setitem(EXTRAS, "hf", Extra("checkpoints", ("no_such_other",)))
    with pytest.raises(
        ImportError, match=re.escape('needs no_such_other, no_such_module: pip install "nosa-jax[hf,plo')
    ):
        require_extras("train", "hf", "plots")


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nosa_jax.cli.plan.plan", interrupt)
    assert main(["plan"]) == 130
    assert "interrupted" in capsys.readouterr().err
