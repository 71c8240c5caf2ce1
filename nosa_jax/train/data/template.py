"""Chat templates: a conversation as the text that a model reads, and where in it the answers are."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nosa_jax._extras import import_extra
from nosa_jax.train.data.tokenize import read_tokenizer_config, special_tokens
from pallas_kernels.checks import bad_value, require_type

Message = Mapping[str, Any]
_FILE = "chat_template.jinja"


class Rendered(NamedTuple):
    """text: a conversation. answers: start and stop in it of what the assistant says in each of its turns, and of what
    ends the turn. unended: how many answers have nothing behind them that ends a turn."""

    text: str
    answers: list[tuple[int, int]]
    unended: int


def is_answer(message: Message) -> bool:
    """Whether a message is of the assistant and says something, or calls a tool."""
    return message["role"] == "assistant" and bool(message.get("tool_calls") or message["content"].strip())


class ChatTemplate:
    """A Jinja template as tokenizers of Hugging Face folders have it, run in a sandbox.

    source: the template.
    special: texts that it may use, such as `bos_token`.
    name: where it is from, for messages.

    Raises ValueError for a template that is no Jinja, ImportError without the extra `train`.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None, name: str = "template") -> None:
        self.name, self._special = name, dict(special or {})
        self._errors = import_extra("jinja2").TemplateError
        try:
            self._template = _environment().from_string(source)
        except self._errors as error:
            raise bad_value(name, "must be a Jinja template", f"({error})", "Correct it.") from error

    @classmethod
    def of_folder(cls, folder: Path) -> ChatTemplate:
        """The template that the tokenizer of a folder comes with; raises ValueError where there is none."""
        file, config = folder / _FILE, folder / "tokenizer_config.json"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), special_tokens(folder), str(file))
        stored = read_tokenizer_config(folder).get("chat_template")
        if isinstance(stored, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
            stored = named.get("default")
        if not isinstance(stored, str):
            remedy = "Pass template=, or the folder of a model that was made for chat."
            raise bad_value("tokenizer", f"must come with a chat template, in {_FILE} or {config.name}", folder, remedy)
        return cls(stored, special_tokens(folder), f"{config}: chat_template")

    def render(
        self, messages: Sequence[Message], where: str = "messages", tools: Any = None, *, prompt: bool = False
    ) -> str:
        """The conversation as text; raises ValueError where that fails.

        where: its file and line, for messages. tools: what the assistant may call. prompt: whether the text goes on to
        where the assistant is to speak.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._special
            )
        # A template is a small program: it may raise what it likes, also through the values that it is given.
        except Exception as error:
            got = f"{type(error).__name__} ({error!s:.200}) in {self.name}"
            rule = "must be a conversation that the template takes"
            raise bad_value(where, rule, got, "Correct or drop it.") from error

    def render_answers(self, messages: Sequence[Message], where: str = "messages", tools: Any = None) -> Rendered:
        """The conversation as text, and where in it the assistant speaks.

        The last message must be an answer. A turn that calls tools is an answer from where the assistant begins to its
        end; any other one begins with its content.
        Raises ValueError where rendering fails, where the template does not write the answers as they are (spaces and
        line ends around them may go), and where a turn that calls tools is not in what it writes.
        """
        text = self.render(messages, where, tools)
        mark = "\ue000"  # of the private use area: nobody writes it, but then
        while mark in text:
            mark += "\ue000"
        # Another text in the place of each answer shows what the template writes around them.
        marked = [{**message, "content": mark} if _speaks(message) else message for message in messages]
        whole = self.render(marked, where, tools)
        around = whole.split(mark)
        said = _spans(text, around, [message["content"] for message in messages if _speaks(message)])
        if said is None:
            remedy = "Use a template that writes what the assistant said unchanged."
            raise bad_value(where, f"must have its answers in what {self.name} writes", f"{text!r:.200}", remedy)
        calling = any(message.get("tool_calls") for message in messages)
        answers, seen, unended = [], 0, 0
        for n, message in enumerate(messages):
            if message.get("tool_calls"):
                places = self._calling_turn(marked, n, whole, where, tools)
                start, stop = (_unmarked(place, whole, mark, said) for place in places)
                answers.append((start, stop))
            elif message["role"] == "assistant":
                # What comes after the last answer and after this one too, as <|im_end|>; the line end behind it is not
                # said. Behind a turn that calls tools there is more: then the answer alone shows what ends it.
                last = self.render(marked[: n + 1], where, tools).rpartition(mark)[2] if calling else around[-1]
                end = _common_start(last, around[seen + 1])
                end = end.rstrip() or end
                unended += not end
                answers.append((said[seen][0], said[seen][1] + len(end)))
            seen += _speaks(message)
        return Rendered(text, answers, unended)

    def _calling_turn(self, messages: Sequence[Message], n: int, whole: str, where: str, tools: Any) -> tuple[int, int]:
        """Start and stop of message n, which calls tools, in the text of all of them: between the text that leads up to
        the assistant and the one that ends with this turn."""
        before = self.render(messages[:n], where, tools, prompt=True)
        start = len(_common_start(before, whole))
        if start < len(before) and start < len(self.render(messages[:n], where, tools)):
            start = len(whole)  # what was before this turn is written otherwise when the conversation goes on
        turn = _common_start(self.render(messages[: n + 1], where, tools), whole)[start:]
        names = [call.get("function", call) for call in messages[n]["tool_calls"]]
        if not turn or any(str(call.get("name", "")) not in turn for call in names if isinstance(call, dict)):
            rule = f"must have its tool_calls in what {self.name} writes, each turn the same wherever it ends"
            remedy = "Use a template for calls of tools, or drop the line."
            raise bad_value(f"{where}: messages[{n}]", rule, f"{whole!r:.200}", remedy)
        return start, start + len(turn.rstrip() or turn)


def _speaks(message: Message) -> bool:
    """Whether the content of a message is what the assistant says; beside calls of tools it may be none."""
    if message["role"] != "assistant":
        return False
    return not message.get("tool_calls") or bool((message["content"] or "").strip())


def _unmarked(place: int, whole: str, mark: str, said: Sequence[tuple[int, int]]) -> int:
    """Where a place in a text with marks lies in the text with what was said instead of them."""
    before = said[: whole.count(mark, 0, place)]
    return place + sum(stop - start - len(mark) for start, stop in before)


def _common_start(a: str, b: str) -> str:
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _spans(text: str, around: Sequence[str], answers: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the answers lie in a text of them and of what is around them, None where it is another one."""
    if len(around) != len(answers) + 1 or not text.startswith(around[0]):
        return None
    spans, at = [], len(around[0])
    for answer, after in zip(answers, around[1:], strict=True):
        written = (answer, answer.strip(), answer.lstrip(), answer.rstrip())
        found = next((as_is for as_is in written if text.startswith(as_is + after, at)), None)
        if found is None:
            return None
        spans.append((at, at + len(found)))
        at += len(found) + len(after)
    return spans if at == len(text) else None


@functools.cache
def _environment() -> Any:
    """Where templates run, with the names that those of Hugging Face folders expect.

    `strftime_now` is not among them: what is trained on must not depend on the day. Templates have a date for that.
    """
    sandbox, extensions = import_extra("jinja2.sandbox"), import_extra("jinja2.ext")
    jinja2 = import_extra("jinja2")

    class Generation(extensions.Extension):
        """The tag around answers that some templates have: what is inside is written as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    return environment


def read_template(template: Any, folder: Path | None) -> ChatTemplate:
    """The template of an argument `template`: its source, or None for that of the tokenizer's folder."""
    if template is not None:
        require_type("template", template, str, "Pass the source of a Jinja template.")
        return ChatTemplate(template, special_tokens(folder) if folder else {})
    if folder is None:
        raise bad_value("template", "must be given for a tokenizer without a folder", None, "Pass its source.")
    return ChatTemplate.of_folder(folder)
