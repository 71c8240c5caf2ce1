"""The flags of `nosa train`: the run and the text that they describe, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from flax import nnx

import nosa_jax
from nosa_jax import parallel, presets, train
from nosa_jax.cli import main
from nosa_jax.cli.data import origin_with
from nosa_jax.cli.train import Train
from nosa_jax.hf import ByteTokenizer
from nosa_jax.origin import Origin
from nosa_jax.train import TrainConfig

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 9
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
SIZES = ["--length=64", "--batch-size=1", "--heldout-fraction=0.2"]


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """The working folder, with text of every kind."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.txt").write_text(name + TEXT)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": TEXT}]
    lines = {"t": {"text": TEXT}, "body": {"body": TEXT}, "chat": {"messages": chat}, "mute": {"messages": chat[:1]}}
    for name, line in lines.items():
        Path(f"{name}.jsonl").write_text((json.dumps(line) + "\n") * 5)
    Path("chat.jinja").write_text(TEMPLATE)
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("latin.jsonl").write_bytes(b'{"text": "\xe4"}\n')
    Path("empty.txt").touch()
    np.arange(3000, dtype=np.uint32).__mod__(9).tofile("ids.bin")
    Path("words").mkdir()
    words = {f"w{i}": i for i in range(300)} | {TEXT.split()[0]: 300, "?": 301}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save("words/tokenizer.json")
    Path("words/tokenizer_config.json").write_text('{"eos_token": "w7"}')
    return tmp_path


@pytest.fixture
def asked(texts, monkeypatch):
    """From flags to the configuration and the source with which `train` is called."""
    calls = []

    def stop(config, source, *_, **__):
        calls.append((config, source))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)

    def ask(*flags):
        assert main(["train", *SIZES, *flags]) == 130
        return calls.pop()

    return ask


@pytest.mark.parametrize(
    ("flags", "source"),
    [
        ("--data a.txt b.txt", lambda **cut: train.text(["a.txt", "b.txt"], **cut)),
        ("--data a.txt --data b.txt", lambda **cut: train.text(["a.txt", "b.txt"], **cut)),
        ("--data body.jsonl --field body", lambda **cut: train.jsonl(["body.jsonl"], field="body", **cut)),
        ("--data ids.bin --token-dtype uint32", lambda **cut: train.tokens(["ids.bin"], dtype="uint32", **cut)),
        (
            "--data chat.jsonl --format chat --template chat.jinja",
            lambda **cut: train.chat(["chat.jsonl"], template=TEMPLATE, **cut),
        ),
        (
            "--data a.txt b.txt --data t.jsonl --weights 3 1 --no-pack",
            lambda **cut: train.mixture(
                [
                    (train.text(["a.txt", "b.txt"], pack=False, **cut), 3),
                    (train.jsonl(["t.jsonl"], pack=False, **cut), 1),
                ]
            ),
        ),
        (
            "--data t.jsonl --data chat.jsonl --weights 1 2 --format jsonl chat --template chat.jinja",
            lambda **cut: train.mixture(
                [(train.jsonl(["t.jsonl"], **cut), 1), (train.chat(["chat.jsonl"], template=TEMPLATE, **cut), 2)]
            ),
        ),
    ],
)
def test_flags_name_a_source(asked, flags, source):
    _, found = asked(*flags.split())
    assert found.fingerprint() == source(length=64, block_size=16, heldout_fraction=0.2).fingerprint()


def test_files_add_up(asked):
    _, once = asked("--files", "a.txt", "b.txt")
    _, twice = asked("--files", "a.txt", "--files", "b.txt")
    assert once.fingerprint() == twice.fingerprint()


def test_a_fresh_model_has_room_for_the_tokenizer(asked):
    assert asked("--data", "a.txt", "--tokenizer", "words")[0].model == dataclasses.replace(
        presets.tiny(), vocab_size=302
    )
    assert asked("--data", "a.txt")[0].model == presets.tiny()


def test_the_variant_is_what_was_asked_for(tmp_path):
    variant = lambda **flags: Train(**flags).config().model.attention.variant
    assert variant() == "nosa"
    assert variant(stage="pretrain") == variant(stage="sft", variant="full") == "full"
    assert [variant(stage="continued", variant=own) for own in (None, "dma")] == ["nosa", "dma"]
    shape = dataclasses.replace(presets.tiny("infllmv2"), num_layers=1)
    TrainConfig(shape, steps=3).save(tmp_path / "run.json")
    run = Train(config_file=tmp_path / "run.json")
    assert run.config() == TrainConfig(shape, steps=3)
    assert dataclasses.replace(run, variant="dma").config().model == shape.with_attention(variant="dma")
    assert dataclasses.replace(run, preset="tiny").config().model == presets.tiny("infllmv2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--preset tiny --init model", "--preset: must not be given with --init, got tiny"),
        ("--stage sft --config-file run.json", "--stage: must not be given with --config-file"),
        ("--stage pretrain --variant nosa", "--variant: must be full in --stage pretrain, got nosa"),
        ("--files a.txt --weights 1", "--data: must be given with --weights, got none"),
        ("--data a.txt b.txt --weights 1 2", "--weights: must be one for each --data, 1 in all, got 2. Write"),
        ("--data a.txt --data b.txt --weights 1 0", "--weights: must be positive, got 0.0"),
        ("--data a.txt t.jsonl", "--data: must be files of one kind, got files of jsonl and text. Pass --format"),
        ("--data a.txt --data t.jsonl --format text jsonl", "--format: must be one without --weights, got text jsonl"),
        ("--data a.txt --field body", "--field: must be given for --data of the format jsonl"),
        ("--data a.txt --template chat.jinja", "--template: must be given for --data of the format chat"),
        ("--data chat.jsonl --format chat", "--template: must be given for chats whose tokenizer is bytes"),
        ("--data chat.jsonl --format chat --tokenizer words", "--tokenizer: must come with a chat template"),
        ("--data mute.jsonl --format chat --template chat.jinja", "mute.jsonl:1: must hold an answer"),
        (
            "--data body.jsonl",
            "body.jsonl:1: must hold text under 'text', got fields ['body']. Correct the line, or pass --field",
        ),
        (
            "--data chat.jsonl",
            "chat.jsonl:1: must hold text under 'text', got fields ['messages']. Read chats with train.chat (--form",
        ),
        (
            "--coordinator localhost --num-processes 2 --process-id 0",
            "--coordinator: must be a host and a port, got loc",
        ),
        ("--data broken.jsonl", "broken.jsonl:2: must be one JSON object"),
        ("--data latin.jsonl", "latin.jsonl:1: must be UTF-8"),
        ("--data empty.txt", "--data: must hold text, got 0 that are not text and 1 that are empty"),
        ("--data a.txt --end-of-text 999 --out new", "--data: must hold token ids below vocab_size = 256"),
        ("--files a.txt --out .", "--out: must be new, empty, or the folder of a run, got . with a.txt, b.txt,"),
        ("--files a.txt --mesh data=2", "--mesh: sizes must multiply to the number of devices, 1, got data=2"),
        ("--files a.txt --process-id 1", "--coordinator and --num-processes: must be given with --process-id"),
    ],
)
def test_mistakes_are_told_in_flags(texts, capsys, flags, said):
    before = sorted(texts.rglob("*"))
    assert main(["train", *SIZES, *flags.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nosa:")]
    assert line.removeprefix("nosa: error: ").startswith(said)
    assert sorted(texts.rglob("*")) == before


def test_a_folder_with_nothing_but_hidden_files_is_empty(asked):
    Path("run").mkdir()
    Path("run/.lock").touch()
    asked("--files", "a.txt", "--out", "run")


def test_bytes_are_told_to_a_model_that_is_trained_on_them():
    model = nnx.eval_shape(lambda: nosa_jax.NosaLM(presets.tiny(), rngs=nnx.Rngs(0)))
    said = [
        Train(data=(("x",),))._tokenizer(*given)[1]
        for given in (
            (None, 999, ["text", "tokens"]),
            (None, 999, ["tokens"]),
            (None, 99, ["text"]),
            (model, 999, ["tokens"]),
        )
    ]
    assert [type(tokenizer) for tokenizer in said] == [ByteTokenizer, *[type(None)] * 3]
    with pytest.raises(
        ValueError, match=r"^--tokenizer: must be given for text where --init brings no tokenizer\.json"
    ):
        Train(data=(("x",),))._tokenizer(model, 999, ["tokens", "text"])


def test_the_model_goes_out_with_what_it_was_trained_with(texts):
    words = nosa_jax.hf.FileTokenizer("words")
    told = origin_with(Origin({"pad_token_id": 1, "mine": 2}, {"vocab.txt": b""}), words, Path("words"), None, None)
    assert sorted(told.files) == ["tokenizer.json", "tokenizer_config.json"]
    assert dict(told.config) == {"eos_token_id": 7, "mine": 2}
    told = origin_with(told, None, None, Path("chat.jinja"), None)
    assert told.files["chat_template.jinja"].decode() == TEMPLATE and told.stop_tokens == (7,)
    assert origin_with(Origin(), ByteTokenizer(), None, None, 10).stop_tokens == (10,)


def test_the_end_of_text_that_a_model_was_trained_with_stops_it():
    """With its own tokenizer, whose other files hold as before."""
    own = {"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": [2, 3], "top_k": 4}'}
    told = [origin_with(Origin({"eos_token_id": 2, "mine": 1}, own), None, None, None, end) for end in (None, 7, 3)]
    assert [origin.stop_tokens for origin in told] == [(2, 3), (7,), (3, 2)]
    assert told[0].files == own
    assert json.loads(told[1].files["generation_config.json"]) == {"eos_token_id": 7, "top_k": 4}
    assert told[1].config == {"eos_token_id": 7, "mine": 1} and told[1].files["tokenizer.json"] == b"{}"
    assert origin_with(Origin(), None, None, None, 7).stop_tokens == (7,)


def test_what_failed_in_another_process_is_no_surprise(texts, monkeypatch, capsys):
    def fail(*_, **__):
        raise parallel.OtherProcessError("training")

    monkeypatch.setattr(train, "train", fail)
    assert main(["train", *SIZES, "--data", "a.txt"]) == 2
    said = "nosa: error: training failed in another process, whose message says why\n"
    assert capsys.readouterr().err.endswith(said)
