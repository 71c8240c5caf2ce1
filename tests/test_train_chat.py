"""Conversations: the text that a template makes of them, and which of its tokens are learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nosa_jax import train
from nosa_jax.hf import ByteTokenizer, FileTokenizer
from nosa_jax.train.data.template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# With what other templates do: a text in front where nobody wrote one, checks, stripped contents, the end of the text
# after every answer, answers of an earlier turn without what was thought, tags around what is generated.
INSTRUCT = """{%- if messages[0].role != 'system' %}{{ bos_token }}Be kind.{% endif %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {%- if loop.index0 > last.user %}{{ '(thought)' }}{% endif %}
        {%- generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}
    {%- else %}{{ '<<' + message.content + '>>' }}
    {%- endif %}
{%- endfor %}"""

# Calls of tools, as the two large families of templates write them: behind the content of a turn that has a prompt, and
# instead of the content, with nothing that leads up to it.
TOOLS = """{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}{{ '\n' + message.content }}{% endif %}
    {%- for call in message.tool_calls %}
        {%- if call.function %}{% set call = call.function %}{% endif %}
        {{- '\n<call>' + call.name + ' ' + (call.arguments | tojson) + '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CALLS_ALONE = """{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
    {%- elif 'tool_calls' in message %}[CALLS]{{ message.tool_calls[0].name }}</s>
    {%- elif message.role == 'assistant' %}{{ message.content }}</s>
    {%- else %}{{ '[RESULT]' + message.content }}{% endif %}
{%- endfor %}"""

TALK = [("user", "Hi"), ("assistant", "Hello, you"), ("user", "assistant?"), ("assistant", "a"), ("user", "bye")]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def learned(path, tokenizer=None, **options):
    """What is learned of every conversation in a file, as texts; and the whole texts."""
    source = train.chat([path], tokenizer, 512, heldout_fraction=0.0, **options)
    decoder = ByteTokenizer() if tokenizer is None else FileTokenizer(tokenizer)
    decode = lambda ids: decoder.decode(ids) if tokenizer is None else decoder.decode(ids, skip_special_tokens=False)
    rows = source.train_rows(0).parents[0].parents[0]
    found = {}
    for row, n in ((each, n) for each in rows for n in range(each.segment_ids.max() + 1)):
        ids, mask = row.tokens[row.segment_ids == n], row.mask[row.segment_ids == n]
        # The place of a token is that of its target, moved by one.
        places = np.append(False, mask[:-1])
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(places)) + 1)
        found[decode(ids)] = [decode(ids[run]) for run in runs if places[run[0]]]
    return found


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of bytes with merges of words, and special tokens, as checkpoints have it; its template is CHATML."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Hello, you, are you assistant? Hello", "assistant user system"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_assistant_is_learned_in_all_its_turns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": messages(*TALK)})
    ((text, spans),) = learned(path, template=CHATML).items()
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, you<|im_end|>\n"
        "<|im_start|>user\nassistant?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )  # and what comes after the last answer is left out
    assert spans == ["Hello, you<|im_end|>", "a<|im_end|>"]


def test_through_a_tokenizer_it_is_the_same(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", {"messages": messages(*TALK)})
    assert learned(path, folder) == learned(path, template=CHATML)
    ids = FileTokenizer(folder).encode("Hello, you<|im_end|>")
    assert len(ids) < 8  # of the one that the template's text is encoded with


def test_other_names_of_roles_and_system_messages(tmp_path):
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello")]
    path = write(tmp_path / "a.jsonl", {"conversations": [{"from": role, "value": text} for role, text in turns]})
    same = write(
        tmp_path / "b.jsonl", {"messages": messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))}
    )
    assert learned(path, template=CHATML) == learned(same, template=CHATML)


def test_a_template_may_do_more_than_join_texts(tmp_path, folder):
    (folder / "chat_template.jinja").write_text(INSTRUCT)  # comes before the one of tokenizer_config.json
    talk = [*TALK[:2], ("tool", "42"), TALK[2], ("assistant", " so\nit is \n")]
    path = write(tmp_path / "a.jsonl", {"messages": messages(*talk)})
    assert learned(path, folder) == {
        "<s>Be kind.[INST] Hi [/INST] Hello, you</s>[INST] assistant? [/INST](thought) so\nit is</s>": [
            " Hello, you</s>",  # the token of the first word begins before it
            "so\nit is</s>",
        ]
    }


@pytest.mark.parametrize(
    "stored", [CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]]
)
def test_where_a_folder_has_its_template(tmp_path, folder, stored):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    path = write(tmp_path / "a.jsonl", {"messages": messages(*TALK)})
    assert list(learned(path, folder).values()) == [["Hello, you<|im_end|>", "a<|im_end|>"]]


CALL = {"name": "add", "arguments": {"a": 1}}


def calling(content, call, **other):
    return {"role": "assistant", "content": content, "tool_calls": [call], **other}


def test_calls_of_tools_are_learned_and_what_they_may_be_is_read(tmp_path):
    ask, result = messages(("user", "1+1?"))[0], messages(("tool", "2"))[0]
    lines = [
        {"messages": [ask, calling("Let me see.", {"function": CALL}), result, *messages(("assistant", "It is 2."))]},
        {"messages": [ask, calling(None, CALL, name=None), result], "tools": [{"name": "add"}]},
        {"messages": [{**ask, "tool_calls": None}, calling("", CALL), result, *messages(("assistant", "2")), ask]},
    ]
    call = '<call>add {"a": 1}</call><|im_end|>'
    asked = "<|im_start|>user\n1+1?<|im_end|>\n"
    answered = "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    assert learned(write(tmp_path / "a.jsonl", *lines), template=TOOLS) == {
        f"{asked}<|im_start|>assistant\nLet me see.\n{call}\n{answered}It is 2.<|im_end|>\n": [
            f"Let me see.\n{call}",
            "It is 2.<|im_end|>",
        ],
        f'<|im_start|>system\n[{{"name": "add"}}]<|im_end|>\n{asked}<|im_start|>assistant\n{call}\n': [call],
        f"{asked}<|im_start|>assistant\n{call}\n{answered}2<|im_end|>\n": [call, "2<|im_end|>"],
    }
    path = write(tmp_path / "b.jsonl", {"messages": [*lines[2]["messages"], calling(None, CALL), result]})
    whole = "[INST]1+1?[/INST][CALLS]add</s>[RESULT]22</s>[INST]1+1?[/INST][CALLS]add</s>"
    assert learned(path, template=CALLS_ALONE) == {whole: ["[CALLS]add</s>", "2</s>", "[CALLS]add</s>"]}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content or '' }}{% endfor %}",
            r"messages\[1\]: must have its tool_calls in what",
        ),
        (CALLS_ALONE, "must have its answers in what template writes"),  # it drops what is said with a call
        ("{{ messages | length }}" + TOOLS, r"messages\[1\]: must have its tool_calls .* the same wherever it ends"),
    ],
)
def test_templates_that_do_not_write_calls_are_named(tmp_path, template, message):
    content = "Well," if template is CALLS_ALONE else None
    path = write(tmp_path / "a.jsonl", {"messages": [*messages(("user", "Hi")), calling(content, CALL)]})
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {message}"):
        train.chat([path], template=template)


def test_answers_that_nothing_ends_are_told_once(tmp_path):
    path = write(tmp_path / "a.jsonl", *2 * [{"messages": messages(*TALK)}])
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    with pytest.warns(UserWarning, match="template writes nothing after 4 answers that is learned with them") as told:
        train.chat([path], template=template, length=512)
    assert len(told) == 1


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
talks = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), max_size=6)


@given(talks, texts)
def test_answers_are_where_the_template_writes_them(talk, last):
    talk = messages(*talk, ("assistant", last))
    text, spans, unended = ChatTemplate(CHATML).render_answers(talk)
    assert unended == 0
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    assert [text[start:stop] for start, stop in spans] == [answer + "<|im_end|>" for answer in answers]
    at = text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
    first = [message["role"] for message in talk].index("assistant")
    if not any("<|im_start|>" in message["content"] for message in talk[:first]):
        assert spans[0][0] == at


@given(texts)
def test_characters_of_bytes(text):
    ((ids, places),) = ByteTokenizer().encode_spans([text])
    assert ids == list(text.encode())
    one_by_one = [[n, n + 1] for n, character in enumerate(text) for _ in character.encode()]
    assert places.tolist() == one_by_one


def test_a_template_has_names_that_others_expect():
    loop = "{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    template = ChatTemplate("{{ messages | tojson }}{{ tools is none }}" + loop)
    assert template.render(messages(("user", "é"))) == '[{"role": "user", "content": "é"}]True01'


def test_a_template_runs_in_a_sandbox():
    with pytest.raises(
        ValueError, match=r"messages: must be a conversation that the template takes, got SecurityError"
    ):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}").render([])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": messages(("user", "Hi"))}, "must hold an answer of the assistant"),
        ({"messages": messages(("user", "Hi"), ("assistant", " "))}, "must hold an answer of the assistant"),
        ({"messages": messages(("bot", "Hi"))}, r"messages\[0\]: role: must be one of \(.*\), got 'bot'"),
        ({"conversations": [{"from": 3, "value": "x"}]}, r"conversations\[0\]: from: must be one of"),
        ({"messages": []}, "must hold a list of messages under 'messages' or 'conversations'"),
        ({"text": "x"}, "must hold a list of messages under 'messages' or 'conversations'"),
        ({"messages": ["x"]}, r"messages\[0\]: must be an object with text under 'content', got 'x'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: must be an object with text"),
        ({"messages": messages(("assistant", "\ud800"))}, "must hold text without single surrogates"),
        ({"messages": [calling(None, 3)]}, r"messages\[0\]: tool_calls: must be a list of objects, got \[3\]"),
        ({"messages": [{**calling("x", {}), "role": "user"}]}, r"messages\[0\]: tool_calls: must be of the assistant"),
        ({"messages": messages(("assistant", "x")), "tools": "[]"}, r"tools: must be a list, got '\[\]'"),
    ],
)
def test_conversations_that_cannot_be_learned_from_are_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"messages": messages(*TALK)}, line)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {message}"):
        train.chat([path], template=CHATML)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"got TemplateError \(roles must alternate\) in template"),
        ("{{ messages[9].role }}", "must be a conversation that the template takes, got UndefinedError"),
        ("{{ messages[0].content + 1 }}", "must be a conversation that the template takes, got TypeError"),
        ("{{ messages[1].content | upper }}", "must have its answers in what template writes, got 'HELLO, YOU'"),
        ("{{ messages[0].content }}", "must have its answers in what template writes, got 'Hi'"),
        ("{{ messages[1].content[:3] }}", "must have its answers in what template writes, got 'Hel'"),
        ("{{ messages[1].content | length }}", "must have its answers in what template writes, got '10'"),
    ],
)
def test_templates_that_fail_are_named(tmp_path, template, message):
    path = write(tmp_path / "a.jsonl", {"messages": messages(*TALK)})
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
        train.chat([path], template=template)


def test_templates_that_are_none_are_refused(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", {"messages": messages(*TALK)})
    with pytest.raises(ValueError, match="template: must be a Jinja template"):
        train.chat([path], template="{% for %}")
    with pytest.raises(ValueError, match="template: must be given for a tokenizer without a folder"):
        train.chat([path])
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: must come with a chat template, in chat_template\.jinja"):
        train.chat([path], folder)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="files: must hold text, got no conversation"):
        train.chat([tmp_path / "empty.jsonl"], template=CHATML)
