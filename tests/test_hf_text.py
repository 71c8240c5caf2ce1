"""Text that streams is the text that decodes, and what a tokenizer.json may not do to prompts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nosa_jax.hf import ByteTokenizer, FileTokenizer, GrowingText, load_tokenizer, stop_tokens

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
WORDS = ["<unk>", "<s>", "\u2581", "\u2581a", "b", "\u2581c", "d"]


def byte_fallback(folder: Path, hole: int = 0) -> FileTokenizer:
    """As Llama 2: a few words and bytes for all else; `hole` ids without a token lie between the two."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    vocab |= {f"<0x{byte:02X}>": len(WORDS) + hole + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder)


def byte_level(folder: Path) -> FileTokenizer:
    """As GPT-2, with a few merges, so that tokens begin and end inside characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ã", "©"), ("æ", "Ĺ"), ("Ĺ", "¥"), ("Ġ", "æ"), ("b", "Ã")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder)


def streamed(tokenizer, prompt: list[int], new: list[int]) -> str:
    text = GrowingText(tokenizer, prompt)
    return "".join([*(text.add(token) for token in new), text.finish()])


TOKENIZERS = {
    "bytes": lambda folder: ByteTokenizer(),
    "fallback": byte_fallback,
    "holes": lambda folder: byte_fallback(folder, hole=5),
    "byte_level": byte_level,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_that_streams_is_the_text_that_decodes(tmp_path, kind):
    tokenizer = TOKENIZERS[kind](tmp_path)
    pieces = ["é", "日本", " a", "b", "€", "\n", " é", "𝄞", "d"]
    random = np.random.default_rng(0)
    for _ in range(200):
        prompt = tokenizer.encode("".join(random.choice(pieces, random.integers(0, 6))))
        new = tokenizer.encode(" a" + "".join(random.choice(pieces, random.integers(1, 8))))
        if random.random() < 0.5:  # what an untrained model says, ids without a token among it
            new = random.integers(0, tokenizer.vocab_size + 10, 12).tolist()
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
        assert streamed(tokenizer, prompt, new) == whole[len(before) :], (prompt, new)


@pytest.mark.parametrize("kind", ["fallback", "byte_level"])
def test_a_prompt_that_ends_in_bytes_does_not_spoil_the_next_character(tmp_path, kind):
    tokenizer = TOKENIZERS[kind](tmp_path)
    whole = tokenizer.encode("bé日")
    for cut in range(1, len(whole)):
        shown = tokenizer.decode(whole[:cut]).rstrip("\ufffd")
        assert shown + streamed(tokenizer, whole[:cut], whole[cut:]) == "bé日"


def test_a_long_prompt_that_is_no_text_takes_time_by_its_length():
    class Counting(ByteTokenizer):
        decoded = 0

        def decode(self, ids):
            Counting.decoded += len(ids)
            return super().decode(ids)

    prompt = [0x80] * 5000
    assert streamed(Counting(), prompt, list(b"a")) == "a"
    assert Counting.decoded < 10 * len(prompt)


@pytest.mark.parametrize("kind", ["bytes", "holes"])
def test_ids_without_a_token_do_not_stop_text(tmp_path, kind):
    tokenizer = TOKENIZERS[kind](tmp_path)
    a, d = tokenizer.encode("a")[-1], tokenizer.encode("d")[-1]
    text = GrowingText(tokenizer, [a])
    assert (
        "".join(text.add(token) for token in (d, tokenizer.vocab_size + 7, 2**31 - 1, d)).replace("\ufffd", "") == "dd"
    )


def test_a_vocabulary_with_holes_reaches_to_its_largest_id(tmp_path):
    tokenizer = byte_fallback(tmp_path, hole=1000)
    assert tokenizer.vocab_size == len(WORDS) + 1000 + 256
    assert tokenizer.decode(tokenizer.encode("é")) == "é"


def test_stored_truncation_padding_and_dropout_are_off(tmp_path):
    expected = byte_level(tmp_path).encode("é" * 20)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    raw["truncation"] = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    raw["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    raw["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert FileTokenizer(tmp_path).encode("é" * 20) == expected


def test_a_byte_order_mark_is_passed_over(tmp_path):
    byte_level(tmp_path)
    for name, text in {"tokenizer.json": None, "generation_config.json": '{"eos_token_id": 3}'}.items():
        file = tmp_path / name
        file.write_text("\ufeff" + (text or file.read_text(encoding="utf-8")), encoding="utf-8")
    assert load_tokenizer(tmp_path, 300).decode([0]) == "!"
    assert stop_tokens(tmp_path) == (3,)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"eos_token_id": "</s>"}',
        '{"eos_token_id": [[2]]}',
        '{"eos_token_id": true}',
        '{"eos_token_id": -1}',
        '{"eos_token_id": 2.5}',
        '{"a": ' + "[" * 10**5,
        '{"a": ' + "9" * 6000 + "}",
        POINTER,
    ],
    ids=lambda content: content[:24],
)
def test_a_damaged_generation_config_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        stop_tokens(tmp_path)


def test_a_file_or_nothing_where_a_folder_belongs(tmp_path):
    byte_level(tmp_path)
    for call in (inspect.unwrap(stop_tokens), lambda path: inspect.unwrap(load_tokenizer)(path, 256)):
        for path in (tmp_path / "tokenizer.json", tmp_path / "nowhere"):
            with pytest.raises(FileNotFoundError, match=r"path: must be a .*folder"):
                call(path)
        with pytest.raises(TypeError, match="path: must be a path"):
            call(None)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*Git LFS.*git lfs pull"):
        FileTokenizer(tmp_path)


def test_bytes_have_a_tokenizer_json_for_any_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")
    tokenizer, plain = FileTokenizer(tmp_path), ByteTokenizer()
    for text in ("héllo  wörld\n\n\0 日本 <s>\t'll 12", "", " "):
        assert tokenizer.encode(text) == plain.encode(text)
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = random.integers(0, 256, 9)
        assert tokenizer.decode(ids) == plain.decode(ids)
    for vocab_size in (256, 73448):
        assert isinstance(load_tokenizer(tmp_path, vocab_size), ByteTokenizer)
    byte_level(tmp_path)
    assert isinstance(load_tokenizer(tmp_path, 300), FileTokenizer)


def test_growing_text_waits_for_whole_characters():
    text = GrowingText(ByteTokenizer())
    pieces = [text.add(byte) for byte in "aé€\n".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "\n"] and text.finish() == ""
    assert [text.add(0xE2), text.add(0x82), text.finish()] == ["", "", "\ufffd"]


def test_growing_text_keeps_the_space_before_a_word(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"\u2581Hello": 0, "\u2581world": 1, "!": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = GrowingText(load_tokenizer(tmp_path, 4), [0])
    assert [text.add(1), text.add(2), text.finish()] == [" world", "!", ""]


def test_tokenizer_and_stop_tokens_come_from_the_folder(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)
    with pytest.raises(ValueError, match="for a vocabulary of 73448"):
        load_tokenizer(tmp_path, 73448)
    assert stop_tokens(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}', encoding="utf-8")
    assert stop_tokens(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}', encoding="utf-8")
    assert stop_tokens(tmp_path) == (2, 7)
