"""The command `nosa` with hostile files, streams and terminals: one line for every error, and nothing lost."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import nosa_jax
from nosa_jax import presets
from nosa_jax._paths import only_run, replacing, user_path
from nosa_jax.cli import main, terminal
from nosa_jax.cli.checkpoint import encode, load
from nosa_jax.cli.export import Export
from nosa_jax.cli.flags import as_typed
from nosa_jax.cli.generate import Generate
from nosa_jax.cli.locality import Locality
from nosa_jax.cli.train import Train
from nosa_jax.hf import ByteTokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "head_dim": 8, "max_context": 192}
TINY = dataclasses.replace(presets.tiny(), **SIZES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    nosa_jax.save_pretrained(nosa_jax.NosaLM(TINY, rngs=nnx.Rngs(0)), folder)
    return folder


def error(arguments: list[str], capsys, *, unexpected: bool = False) -> str:
    """Runs `nosa`, expects exit code 2 and ends on one line that says why, and returns it.

    unexpected: whether it is an error that nobody thought of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("nosa: error: ")]
    assert len(lines) == 1 and said.endswith(lines[0] + "\n")
    message = lines[0].removeprefix("nosa: error: ")
    assert message.startswith("unexpected") == unexpected
    return message


# --- Files ---------------------------------------------------------------------------------------------------------


def put(content: bytes, name: str = "config.json") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def folder_for(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


WEIGHTS = "model.safetensors"
# By name: what is changed in a folder, and how the error begins; {} stands for the folder.
BAD_FOLDERS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "path: must be a .*folder with a config.json"),
    "an empty config": (put(b""), "{}/config.json: must be valid JSON"),
    "a binary config": (put(bytes(range(256))), "{}/config.json: must be valid JSON"),
    "a list for a config": (put(b"[1]"), "{}/config.json: must hold a JSON object, got list"),
    "a config of nothing": (put(b"{}"), "config.json: model_type must be one of .*got None"),
    "a folder for a config": (folder_for("config.json"), "path: must be a .*folder with a config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "path: must hold model.safetensors or"),
    "empty weights": (put(b"", WEIGHTS), "{}/model.safetensors: must be a whole safetensors file"),
    "text for weights": (
        put(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", WEIGHTS),
        "{}/model.safetensors: must be the file itself, got a pointer of Git LFS",
    ),
    "a huge header": (
        put(b"\xff" * 7 + b"\x7f{}", WEIGHTS),
        "{}/model.safetensors: .*header too large",
    ),
    "cut weights": (lambda folder: os.truncate(folder / WEIGHTS, 5000), "{}/model.safetensors: must be a whole"),
    "a folder for weights": (folder_for(WEIGHTS), "path: must hold model.safetensors or"),
    "an empty tokenizer": (put(b"", "tokenizer.json"), "{}/tokenizer.json: must be a valid tokenizer.json"),
    "a binary tokenizer": (put(bytes(range(256)), "tokenizer.json"), "{}/tokenizer.json: must be a valid"),
    "a tokenizer of nothing": (put(b"{}", "tokenizer.json"), "{}/tokenizer.json: must be a valid"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_checkpoint_folders_are_one_line(saved, tmp_path, capsys, name):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    change, begins = BAD_FOLDERS[name]
    change(folder)
    said = error(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "1"], capsys)
    assert re.match(begins.format(re.escape(str(folder))) if "{}/" in begins else begins, said)


LONG = "x" * 300
BAD_PATHS = {
    "/dev/null": (
        "path: must be a local checkpoint folder, got /dev/null",
        "--text: must have at least 1024 tokens, got 0",
        "--files: must each find a file, got '/dev/null'",
    ),
    "\0": ("path: must be a path, got", "--text: must be a path, got", "--files: must be a path, got"),
    "~nobody-of-this-name/x": tuple(
        f"{name}: must lie below a home folder that is known" for name in ("path", "--text", "--files")
    ),
    LONG: (f"{LONG}: File name too long",) * 3,
    "nowhere": (
        "path: must be a local checkpoint folder, got nowhere",
        "nowhere: No such file",
        "--files: must each find a file, got 'nowhere'",
    ),
}


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths_are_one_line(saved, tmp_path, capsys, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    checkpoint, text, files = BAD_PATHS[path]
    assert error(["generate", path, "--prompt", "x"], capsys).startswith(checkpoint)
    assert error(["locality", path], capsys).startswith(checkpoint)
    assert error(["locality", str(saved), "--text", path], capsys).startswith(text)
    assert error(["train", "--files", path], capsys).startswith(files)
    assert not any(tmp_path.iterdir())  # no folder is made for what cannot be read


def test_the_folder_is_not_asked_again_after_the_model(saved, tmp_path, capsys, monkeypatch):
    """Another writer may have replaced it."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 65}')

    def load_and_lose(*arguments: object) -> nosa_jax.NosaLM:
        model = load(*arguments)
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "tokenizer.json").write_text("another")
        return model

    steps = [nosa_jax.Step(np.asarray([token], np.int32), fetched=np.zeros((1, 1, 2), np.int32)) for token in b"xyAz"]
    monkeypatch.setattr("nosa_jax.cli.generate.load", load_and_lose)
    monkeypatch.setattr(nosa_jax, "stream", lambda *_, **__: iter(steps))
    assert main(["generate", str(folder), "--prompt", "caf\udce9"]) == 0
    assert capsys.readouterr().out == "caf\ufffdxy\n"
    text = tmp_path / "text.txt"
    text.write_bytes(b"caf\xe9" * 2)
    locality = Locality(folder, text, prompt_length=4, new_tokens=4)
    assert bytes(locality._read_tokens(nosa_jax.from_pretrained(saved)).tolist()) == b"caf\xe9" * 2


def test_bad_texts_are_one_line(saved, tmp_path, capsys):
    binary = tmp_path / "numbers.npy"
    np.save(binary, np.arange(5000))
    locality = ["locality", str(saved), "--out", str(tmp_path / "out"), "--text"]
    assert error([*locality, str(binary)], capsys).startswith(f"--text: must be a text file, got {binary}, which is")
    assert "Is a directory" in error([*locality, str(tmp_path)], capsys)
    train = ["train", "--out", str(tmp_path / "run"), "--files"]
    assert error([*train, str(binary)], capsys).startswith("--files: must hold text, got 1 that is not text")
    (tmp_path / "short.txt").write_text("short")
    assert "--files" in error([*train, str(tmp_path / "short.txt"), str(binary)], capsys)


def test_what_is_in_the_way_of_the_model_is_seen_before_training(tmp_path, capsys, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained in vain")

    monkeypatch.setattr(nosa_jax.train, "train", never)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("irreplaceable")
    for command in (["train"], ["demo"]):
        said = error([*command, "--out", str(tmp_path)], capsys)
        assert said.startswith("--out: must be new, empty, or a folder with a Llama, Qwen,") and "model" in said


@pytest.mark.parametrize("command", ["locality", "demo"])
def test_a_folder_of_results_has_one_run_at_a_time(saved, tmp_path, capsys, command):
    with only_run("--out", tmp_path):
        said = error([command, *([str(saved)] if command == "locality" else []), "--out", str(tmp_path)], capsys)
    assert said.startswith("--out: must be a folder without another run in it")


def test_any_other_error_is_one_line_too(capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("text\nof two lines")

    monkeypatch.setattr("nosa_jax.cli.plan.plan", fail)
    said = error(["plan"], capsys, unexpected=True)
    assert said == r"unexpected KeyError: 'text\nof two lines' (NOSA_TRACEBACK=1 shows where it comes from)"


def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    seen = []
    for command in (Train, Generate, Locality):
        monkeypatch.setattr(command, "run", lambda self: seen.append(self) or 0)
    assert main(["train", "--out=~/run"]) == main(["generate", "~/m"]) == 0
    assert main(["locality", "~/m", "--text", "~/t", "--out=~/o"]) == 0
    train, generated, locality = seen
    assert (train.out, generated.path) == (tmp_path / "run", tmp_path / "m")
    assert (locality.path, locality.text, locality.out) == (tmp_path / "m", tmp_path / "t", tmp_path / "o")


@pytest.mark.parametrize("path", [5, None, b"bytes", "", "a\0b", "~nobody-of-this-name"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises((TypeError, ValueError), match="folder: must"):
        user_path("folder", path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "results.json"
    file.write_text("old")
    with pytest.raises(OSError, match="No space left"), replacing(file) as new:
        new.write_text("half of the n")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]
    (tmp_path / "link").symlink_to(file)
    with replacing(tmp_path / "link") as new:
        new.write_text("new")
    assert file.read_text() == "new" and (tmp_path / "link").is_symlink()


def test_a_file_that_is_replaced_keeps_who_may_read_it(tmp_path):
    file = tmp_path / "results.json"
    for mode in (0o600, 0o664):
        file.touch()
        file.chmod(mode)
        with replacing(file) as new:
            new.write_text("new")
        assert file.stat().st_mode & 0o777 == mode


def test_a_folder_that_is_missing_is_named_as_it_was_given(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, replacing(tmp_path / "nowhere" / "results.json"):
        pytest.fail("there is nowhere to write to")
    assert raised.value.filename == str(tmp_path / "nowhere" / "results.json")


# --- Streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_output_cannot_show_is_replaced(monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", output)
    with terminal.usable_streams():
        terminal.show("a 你 b")
        terminal.heading("é")
    assert output.errors == "strict"
    shown = output.buffer.getvalue().decode(encoding)
    assert shown.startswith("a 你 b" if encoding == "utf-8" else "a ? b")


def test_closed_streams_are_stood_in_for(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with terminal.usable_streams():
        terminal.show("nowhere")
        terminal.show("nowhere", stderr=True)
        terminal.heading("nowhere")
        with terminal.working("nothing"):
            pass
        assert sys.stdin.read() == ""
    assert sys.stdout is None


@pytest.mark.slow
def test_a_process_without_streams_keeps_its_files_clean(tmp_path):
    """Descriptor 2 would be the next file that is opened, and the log of a library would go into it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"exec {sys.executable} -m nosa_jax plan --json <&- 2>&-"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, env=environment, check=True, cwd=tmp_path)
    assert json.loads(done.stdout)["preset"] == "nosa_8b"


class Gone(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_terminal_that_is_gone_is_no_error_and_a_reader_that_is_gone_ends_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone(32))
    with terminal.working("something"):
        terminal.note("nobody reads this")
    monkeypatch.setattr(sys, "stdout", Gone(5))
    terminal.heading("nobody reads this")
    monkeypatch.setattr(sys, "stdout", Gone(32))
    with pytest.raises(BrokenPipeError):
        terminal.heading("nobody reads this")
    assert main(["plan"]) == 1


def test_no_color(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown() -> str:
        monkeypatch.setattr(sys, "stdout", Terminal())
        terminal.heading("x")
        return sys.stdout.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown() == "\n\033[1mx\033[0m\n"
    monkeypatch.setenv("NO_COLOR", "")
    assert "\033" in shown()  # as no-color.org says
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "\nx\n"


class Words:
    """A tokenizer of words, which are UTF-8."""

    def encode(self, text: str) -> list[str]:
        return text.split(" ")


def test_bytes_are_tokens_as_they_are_and_other_tokenizers_get_text(tmp_path, capsys, monkeypatch):
    latin = "naïve\r\ncafé".encode("latin-1")
    assert bytes(encode(ByteTokenizer(), latin, "the text")) == latin
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")  # as `nosa train` does
    assert bytes(encode(load_tokenizer(tmp_path, 256), latin, "the text")) == latin
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True, raising=False)
    assert encode(Words(), "ü x\r\n".encode(), "the text") == ["ü", "x\r\n"]
    assert encode(Words(), latin, "the text") == ["na\ufffdve\r\ncaf\ufffd"]
    assert (
        capsys.readouterr().err
        == "nosa: note: the text is not UTF-8 (byte 2); what cannot be read is taken as U+FFFD\n"
    )


def test_a_prompt_is_the_bytes_that_were_typed(monkeypatch):
    read = lambda prompt=None: Generate(Path("x"), prompt)._read_prompt()
    assert read("caf\udce9") == b"caf\xe9"  # as Python passes an argument that is not UTF-8
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\r\n"), "ascii"))
    assert read() == b"caf\xe9\r\n"


def test_warnings_are_notes(capsys, monkeypatch):
    monkeypatch.setattr("nosa_jax.cli.plan.plan", lambda *_, **__: warnings.warn("mind\nthis", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main(["plan"])
    assert capsys.readouterr().err == "nosa: note: mind this\n"


# --- Words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        (Generate(Path("m")), "Sampling.top_k: must be >= 1", "--top-k: must be >= 1"),
        (Generate(Path("m")), "Lower max_new_tokens, or slots.", "Lower --max-new-tokens, or slots."),
        (Generate(Path("m")), "chunk: must be >= 1, got 0", "--chunk: must be >= 1, got 0"),
        (Generate(Path("m")), "set offload=False or slots=None.", "set --no-offload or no --slots."),
        (Generate(Path("m")), "path: must be a folder", "path: must be a folder"),
        (Generate(Path("m")), "got /home/max_new_tokens/seed", "got /home/max_new_tokens/seed"),
        (Train(), "directory: x. Pass resume=True to go on", "--out: x. Pass --resume to go on"),
        (Train(), "or pass heldout_fraction=0.0.", "or pass --heldout-fraction 0.0."),
        (Train(), "TrainConfig.seed: must be 0, got 1.", "--seed: must be 0, got 1."),
        (Train(), "Correct it, or pass field=.", "Correct it, or pass --field."),
        (Train(), "TrainConfig.model: a model. Pass (model=)", "--preset and --variant: a model. Pass (--init)"),
        (Train(data=(("a",),)), "source: must hold text, not data=2.", "--data: must hold text, not data=2."),
        (
            Export(Path("run"), Path("out")),
            "step: must be 1. Pick one or pass None.",
            "--step: must be 1. Pick one or leave it out.",
        ),
        (None, "max_new_tokens: x", "max_new_tokens: x"),
    ],
)
def test_messages_name_flags(command, message, expected):
    assert as_typed(message, command) == expected


def test_rooms_come_when_they_are_asked_for():
    assert nosa_jax.__getattr__("train").TrainConfig.steps == 500
    assert nosa_jax.__getattr__("plots").plot_comparison is nosa_jax.locality.plot_comparison
    with pytest.raises(AttributeError, match=re.escape("module 'nosa_jax' has no attribute 'trian'")):
        nosa_jax.trian  # noqa: B018
