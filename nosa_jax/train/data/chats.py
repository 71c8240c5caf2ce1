"""Conversations: what the assistant says is learned, the rest is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nosa_jax.train.data.documents import Collector
from nosa_jax.train.data.files import unique_files, warn
from nosa_jax.train.data.json_lines import read_objects
from nosa_jax.train.data.readers import Files, require_tokens, total_bytes
from nosa_jax.train.data.source import Cut, DocumentSource
from nosa_jax.train.data.template import Message, is_answer, read_template
from nosa_jax.train.data.tokenize import TokenizerLike, as_utf8, grouped, progress_bar, read_vocabulary
from pallas_kernels.checks import bad_value, require_one_of

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # of roles, where conversations have from and value


class _Talk(NamedTuple):
    """A conversation as text, start and stop of what is learned in it, and its bytes."""

    text: str
    answers: list[tuple[int, int]]
    size: int


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
    A message goes to the template whole, `tool_calls` and all, and so do the "tools" of a line, a list. What is null is
    left out. Where the assistant calls tools its message needs no content.

    files: paths of JSON lines; those that end in .gz are unpacked.
    tokenizer: a folder with a tokenizer.json, or as in `text`.
    template: source of the Jinja template that makes text of a conversation. None: that of the tokenizer's folder.
    All other arguments, rows and memory: as in `text`; one byte more per token says whether it is learned.

    The template writes all special tokens. `mask` is True for what the assistant says, in all its turns, for its calls
    of tools, and for what ends a turn (<|im_end|>, say); what comes after the last answer is left out. Where a template
    writes nothing after an answer a warning says so, as a model does not learn to stop there. `bytes_per_token` is of
    the whole text.

    Raises TypeError or ValueError as `jsonl` does, and with file and line for a conversation without an answer, of an
    unknown role, or that the template does not take. Roles are system, user, assistant and tool.
    """
    cut = Cut(length, pack, block_size, heldout_fraction, heldout_seed)
    vocabulary = read_vocabulary(tokenizer)
    written = read_template(template, vocabulary.folder)
    paths = unique_files(files)
    collector, size, unended = Collector(vocabulary.dtype, masked=True), 0, 0

    def talks() -> Iterator[_Talk]:
        nonlocal unended
        for line, where in read_objects(paths):
            messages = _up_to_last_answer(_messages(line, where), where)
            text, answers, without_end = written.render_answers(messages, where, _tools(line, where))
            unended += without_end
            yield _Talk(text, answers, len(as_utf8(text, where)))

    with progress_bar("reading", total=total_bytes(paths), shown=progress) as bar:
        for group in grouped(talks(), lambda talk: talk.size):
            encoded = vocabulary.tokenizer.encode_spans([talk.text for talk in group])
            for talk, (ids, places) in zip(group, encoded, strict=True):
                collector.add(ids, _within(places, talk.answers))
            size += sum(talk.size for talk in group)
            bar.update(sum(talk.size for talk in group))
    tokens, spans = collector.finish()
    require_tokens(tokens, "no conversation")
    if unended:
        warn(
            f"{written.name} writes nothing after {unended} answers that is learned with them: a model does not learn "
            "to stop there. Use a template that ends every turn, with a token for that."
        )
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
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if not isinstance(content, str) and not (calls and content is None):
            rule = f"must be an object with text under {content_key!r}"
            raise bad_value(place, rule, f"{message!r:.80}", "Correct or drop the line.")
        role = message.get(role_key)
        if isinstance(role, str) and key == "conversations":
            role = _OTHER_NAMES.get(role, role)
        require_one_of(f"{place}: {role_key}", role, ROLES, "Rename the role.")
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            rule = "must be a list of objects"
            raise bad_value(f"{place}: tool_calls", rule, f"{calls!r:.80}", "Correct or drop the line.")
        if calls and role != "assistant":
            raise bad_value(f"{place}: tool_calls", "must be of the assistant", f"role {role!r}", "Correct the line.")
        # A column of a table holds null where a message lacks what others have: templates ask whether it is there.
        given = {name: value for name, value in message.items() if value not in (None, []) and name != role_key}
        given.pop(content_key, None)
        messages.append({"role": role, "content": content, **given})
    return messages


def _tools(line: dict[str, Any], where: str) -> list[Any] | None:
    """What the assistant may call, as templates take it."""
    tools = line.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise bad_value(f"{where}: tools", "must be a list", f"{tools!r:.80}", "Write it as JSON, not as text of it.")
    return tools or None


def _up_to_last_answer(messages: list[Message], where: str) -> list[Message]:
    answers = [n for n, message in enumerate(messages) if is_answer(message)]
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
