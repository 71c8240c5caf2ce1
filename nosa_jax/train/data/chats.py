"""Conversations: what the assistant says is learned, the rest is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from nosa_jax.train.data.documents import Collector
from nosa_jax.train.data.files import unique_files
from nosa_jax.train.data.json_lines import read_objects
from nosa_jax.train.data.readers import Files, require_tokens, total_bytes
from nosa_jax.train.data.source import Cut, DocumentSource
from nosa_jax.train.data.template import Message, read_template
from nosa_jax.train.data.tokenize import TokenizerLike, as_utf8, progress_bar, read_vocabulary
from pallas_kernels.checks import bad_value, require_one_of

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # of roles, where conversations have from and value


def chat(
    files: Files,
    tokenizer: TokenizerLike = None,
    length: int = 8192,
    pack: bool = True,
    *,
    template: str | None = None,
    block_size: int = 64,
    heldout_fraction: float = 0.05,
    heldout_seed: int = 0,
    progress: bool = True,
) -> DocumentSource:
    """A source of conversations, one per line: {"messages": [{"role": ..., "content": ...}, ...]}.

    Lines with "conversations" of "from" and "value", where "human" is the user and "gpt" the assistant, will do too.

    files: paths of JSON lines; those that end in .gz are unpacked.
    tokenizer: a folder with a tokenizer.json, or as in `text`.
    template: source of the Jinja template that makes text of a conversation. None: that of the tokenizer's folder.
    All other arguments, rows and memory: as in `text`; one byte more per token says whether it is learned.

    The template writes all special tokens. `mask` is True for what the assistant says, in all its turns, and for what
    ends a turn (<|im_end|>, say); what comes after the last answer is left out. `bytes_per_token` is of the whole text.

    Raises TypeError or ValueError as `jsonl` does, and with file and line for a conversation without an answer, of an
    unknown role, or that the template does not take. Roles are system, user, assistant and tool.
    """
    cut = Cut(length, pack, block_size, heldout_fraction, heldout_seed)
    vocabulary = read_vocabulary(tokenizer)
    written = read_template(template, vocabulary.folder)
    paths = unique_files(files)
    collector, size = Collector(vocabulary.dtype, masked=True), 0
    with progress_bar("reading", total=total_bytes(paths), shown=progress) as bar:
        for line, where in read_objects(paths):
            text, answers = written.render_answers(_up_to_last_answer(_messages(line, where), where), where)
            size += len(as_utf8(text, where))
            ids, places = vocabulary.tokenizer.encode_spans(text)
            collector.add(ids, _within(places, answers))
            bar.update(len(text))
    tokens, spans = collector.finish()
    require_tokens(tokens, "no conversation")
    bytes_per_token = size / tokens.size
    return cut.source(tokens, spans, bytes_per_token=bytes_per_token, vocab_size=vocabulary.size(tokens))


def _messages(line: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a line, with roles as templates know them."""
    key, role_key, content_key = (
        ("messages", "role", "content") if "messages" in line else ("conversations", "from", "value")
    )
    found = line.get(key)
    if not isinstance(found, list) or not found:
        rule = "must hold a list of messages under 'messages' or 'conversations'"
        raise bad_value(where, rule, f"{line!r:.80}", "Correct or drop the line.")
    messages: list[Message] = []
    for number, message in enumerate(found):
        place = f"{where}: {key}[{number}]"
        content = message.get(content_key) if isinstance(message, dict) else None
        if not isinstance(content, str):
            rule = f"must be an object with text under {content_key!r}"
            raise bad_value(place, rule, f"{message!r:.80}", "Correct or drop the line.")
        role = message.get(role_key)
        if isinstance(role, str) and key == "conversations":
            role = _OTHER_NAMES.get(role, role)
        require_one_of(f"{place}: {role_key}", role, ROLES, "Rename the role.")
        messages.append({"role": role, "content": content})
    return messages


def _up_to_last_answer(messages: list[Message], where: str) -> list[Message]:
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    if not answers:
        got = f"roles {[message['role'] for message in messages]}"
        raise bad_value(where, "must hold an answer of the assistant, which is what is learned", got, "Drop the line.")
    return messages[: answers[-1] + 1]


def _within(places: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens, of characters [N, 2], have a part in one of `spans`."""
    learned = np.zeros(len(places), bool)
    for start, stop in spans:
        learned |= (places[:, 0] < stop) & (places[:, 1] > start)
    return learned
