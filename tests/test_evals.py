"""Tasks for long contexts: what is asked can be answered from the prompt, and right answers score."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from support import OFFLOADED, lively_model, small_config

import nosa_jax
from nosa_jax import CacheConfig, baselines, evals
from nosa_jax.evals.batches import like_lengths, stacked
from nosa_jax.evals.evaluation import judge
from nosa_jax.evals.examples import SLACK, largest
from nosa_jax.evals.metrics import contains, exact, f1, recall
from nosa_jax.evals.scoring import Forced
from nosa_jax.hf import ByteTokenizer, FileTokenizer

BYTES = ByteTokenizer()
POLICY = CacheConfig(policy=baselines.ArkVale())
TEXT = "\n".join(f"Line {n} of a text about the {n * 7 % 11}th of many things, as long as any." for n in range(150))


@functools.cache
def made(task: str, length: int, seed: int = 0, count: int = 3) -> list[evals.Example]:
    return evals.make(task, length, BYTES, count, seed, haystack=TEXT)


@functools.cache
def subwords() -> FileTokenizer:
    """A tokenizer of pieces of words that begins every text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return FileTokenizer.from_json(tokenizer.to_str().encode())


def least_length(task: str) -> int:
    """Tokens that the smallest examples of a task take, about."""
    with pytest.raises(ValueError, match="length: must hold the smallest example") as error:
        evals.make(task, 1, BYTES, 1, haystack=TEXT)
    return int(re.search(r"(\d+) tokens", str(error.value))[1]) + 40  # names are not all equally long


# --- tasks --------------------------------------------------------------------------------------------------------


def solve(task: str, prompt: str) -> list[str]:
    """The answer, read off the prompt by other code than made it."""
    context, _, question = prompt.rpartition("\n\n")
    question = question.split("\n")[0]
    if task.startswith("niah"):
        said = re.findall(r"The secret code of the ([a-z ]+) is (\w+)\.", context)
        asked = re.findall(r"the ([a-z]+ [a-z]+)[,.?]", question)
        return [value for name in asked for key, value in said if key == name]
    if task == "variable_tracking":
        values: dict[str, str] = {}
        for new, old in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", context, re.MULTILINE):
            values[new] = values.get(old, old)
        return [name for name, value in values.items() if value in question]
    if task in ("common_words", "frequent_words"):
        counts = Counter(context.split("\n\n")[1].split())
        best = [word for word, _ in counts.most_common(int(re.search(r"Which (\d+)", question)[1]))]
        return sorted(best) if task == "common_words" else best
    if task == "mqar":
        pairs = dict(line.split() for line in context.split("\n\n")[1].splitlines())
        return [pairs[key] for key in re.search(r"keys (.*?)\?", question)[1].split(", ")]
    if task == "kv_json":
        return [json.loads(context.split("\n\n")[1])[re.search(r'"(.*?)"', question)[1]]]
    rows = [line.split(" | ") for line in context.split("\n\n")[1].splitlines()]
    city, year = re.search(r"city (\w+) and the year (\d+)", question).groups()
    return [row[0] for row in rows if row[1:3] == [city, year]]


@pytest.mark.parametrize("task", evals.TASKS)
def test_answers_follow_from_prompts_that_fill_their_length(task):
    for length in (least_length(task), 1100, 3000):
        for example in made(task, length):
            assert solve(task, example.prompt) == list(example.wanted)
            assert example.answer.replace('"', "") == f" {', '.join(example.wanted)}"
            assert [*example.prompt_ids, *example.answer_ids] == BYTES.encode(example.prompt + example.answer)
            assert len(example.answer_ids) + SLACK == example.room
            assert length - 100 < len(example.prompt_ids) + example.room <= length
    description = evals.TASKS[task].description
    assert description and all(option.meaning for option in evals.TASKS[task].options.values())


@pytest.mark.parametrize("task", evals.TASKS)
def test_examples_depend_on_task_length_seed_and_index_alone(task):
    again = evals.make(task, 1100, BYTES, 5, 0, haystack=TEXT)
    assert again[:3] == made(task, 1100)
    prompts = [example.prompt for seed in (0, 1) for example in made(task, 1100, seed)]
    assert len(set(prompts)) == 6
    answers = {example.answer for seed in (0, 1) for length in (1100, 3000) for example in made(task, length, seed)}
    assert len(answers) == 12


@pytest.mark.parametrize("task", ["niah_multikey", "variable_tracking", "mqar", "kv_json", "extract_records"])
def test_evidence_lies_where_it_is_said_to(task):
    for tokenizer in (BYTES, subwords()):
        example = evals.make(task, 1500, tokenizer, 1, seed=3, haystack=TEXT)[0]
        assert len(example.needles) == len(example.depths) == len(example.wanted)
        for token, wanted in zip(example.needles, example.wanted, strict=True):
            line = tokenizer.decode(example.prompt_ids[token:]).split("\n")[0]
            assert re.search(rf"(?<!\w){wanted}(?!\w)", line), (line, wanted)
        assert all(0 < depth < 1 for depth in example.depths)


def test_depths_spread_evenly_or_are_where_they_are_asked_for():
    depths = sorted(example.depths[0] for example in evals.make("niah_single", 3000, BYTES, 20, haystack=TEXT))
    assert np.diff(depths).max() < 0.12 and depths[0] < 0.15 and depths[-1] > 0.85
    for depth in (0, 0.5, 1):
        for task in ("niah_single", "niah_multikey", "kv_json"):
            (found,) = evals.make(task, 3000, BYTES, 1, haystack=TEXT, depth=depth)
            asked = found.needles[0] / len(found.prompt_ids)
            assert abs(asked - depth) < 0.12


def test_options_make_tasks_harder():
    example = evals.make("niah_multikey", 2000, BYTES, 1, haystack=TEXT, keys=9, value="uuid")[0]
    assert example.prompt.count("The secret code of") == 10 and len(example.wanted[0]) == 36
    assert dict(example.difficulty) == {"keys": 9, "depth": None, "value": "uuid"}
    example = evals.make("variable_tracking", 2000, BYTES, 1, haystack=TEXT, chains=3, hops=2)[0]
    assert example.prompt.count("\nVAR ") == 9 and len(example.wanted) == 3
    assert solve("variable_tracking", example.prompt) == list(example.wanted)
    assert len(evals.make("mqar", 1000, BYTES, 1, queries=7)[0].wanted) == 7
    records = evals.make("extract_records", 3000, BYTES, 1, matches=4)[0]
    assert len(records.wanted) == 4 and records.depths[-1] - records.depths[0] > 0.3
    many = evals.make("niah_multikey", 40000, BYTES, 1, haystack=TEXT, keys=600)[
        0
    ]  # more than there are pairs of words
    assert many.prompt.count("The secret code of") == 601


def test_other_tokenizers_and_chats():
    tokenizer = subwords()
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    for options in ({}, {"chat": True, "template": template}):
        for example in evals.make("niah_single", 700, tokenizer, 3, haystack=TEXT, **options):
            assert 690 < len(example.prompt_ids) + example.room <= 700
            assert (example.prompt_ids[0] == 0) == (not options)  # <s>, which a template writes itself
            assert tokenizer.decode(example.prompt_ids) == example.prompt
            assert tokenizer.decode(example.answer_ids) == example.answer
            assert solve("niah_single", example.prompt.replace("[end][assistant]", "\n")) == list(example.wanted)
            if options:
                assert example.prompt.startswith("[user]Some") and "[end][assistant]The secret" in example.prompt


def test_the_haystack_is_the_users_or_docstrings():
    lines = set(TEXT.splitlines())
    body = made("niah_single", 3000)[0].prompt.split("\n\n")[1].splitlines()
    assert len([line for line in body if line in lines]) > 20
    again = evals.make("niah_single", 9000, BYTES, 1, haystack="A single line that is asked for again and again. ")[0]
    assert again.prompt.count("asked for again") > 100
    example = evals.make("niah_single", 3000, BYTES, 1)[0]
    assert example.prompt.isascii() and solve("niah_single", example.prompt) == list(example.wanted)


def test_the_largest_size_is_found_in_few_steps():
    for rate, offset, budget in ((1, 0, 10**6), (0.3, 50, 4096), (80, 10, 4096), (1, 0, 10)):
        asked = []
        cost = lambda size, rate=rate, offset=offset, asked=asked: asked.append(size) or int(offset + rate * size)
        size = largest(cost, budget)
        assert cost(size) <= budget and budget - cost(size) <= max(budget // 500, rate)
        assert len(asked) < 14
    assert largest(lambda size: size + 11, 10) is None
    steps = lambda size: 100 * (size // 7)  # no straight line
    assert steps(largest(steps, 1000)) == 1000


# --- scores -------------------------------------------------------------------------------------------------------


def test_metrics():
    wanted = ("1234567", "Bergen")
    assert recall("it is 1234567 and BERGEN.", wanted) == contains("it is 1234567, bergen", wanted) == 1
    assert recall("it is 12345678", wanted) == 0 and recall("it is 1234567", wanted) == 0.5
    assert contains("it is 1234567", wanted) == 0
    assert exact("\n 1234567,  bergen.\nmore", wanted) == 1 and exact("Bergen, 1234567", wanted) == 0
    ids = ("R11", "R22")
    assert f1("R11, R22", ids) == 1 and f1("none", ids) == 0
    assert f1("R11 R33", ids) == 0.5 and f1("r11, R22, R33 R44, R555", ids) == pytest.approx(2 * 2 / 6)
    assert f1('"ab-1"', ("ab-1",)) == 1


@pytest.mark.parametrize("task", evals.TASKS)
def test_right_answers_score_1_and_wrong_ones_0(task):
    examples = made(task, 1100)
    forced = [Forced(-2.0, len(example.answer_ids), len(example.answer_ids)) for example in examples]
    right = judge(examples, [f"{example.answer}.\nIs that all?" for example in examples], forced)
    assert [one["score"] for one in right] == [1.0] * 3 and all(one["forced_exact"] for one in right)
    wrong = judge(examples, ["I do not know."] * 3, None)
    assert [one["score"] for one in wrong] == [0.0] * 3 and wrong[0]["forced_exact"] is None


def test_rows_of_like_lengths():
    groups = list(like_lengths([3, 9, 5, 9, 1], 2))
    assert groups == [[1, 3], [2, 0], [4]]
    assert [len(group) for group in like_lengths([40000] * 3 + [10] * 20, None)] == [1, 1, 1, 16, 4]
    tokens, lengths = stacked([[1, 2], [3]], 3, width=4)
    assert tokens.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [1, 2, 0, 0]] and lengths.tolist() == [2, 1, 2]


@pytest.fixture
def cheating(monkeypatch):
    """A model that knows the answers of the first task and of no other."""
    knows = lambda example: example.task == "mqar"

    def say(model, tokenizer, examples, **_):
        return [example.answer if knows(example) else "no" for example in examples]

    def read(model, examples, **_):
        sizes = [len(example.answer_ids) for example in examples]
        return [Forced(-1.0, n, n if knows(e) else n // 2) for n, e in zip(sizes, examples, strict=True)]

    monkeypatch.setattr("nosa_jax.evals.evaluation.answer", say)
    monkeypatch.setattr("nosa_jax.evals.evaluation.score_answers", read)


def test_the_table(cheating, tmp_path, monkeypatch):
    model = lively_model(small_config())
    tasks = ("mqar", "niah_single")
    seen: list[evals.Table] = []
    table = evals.evaluate(
        model, BYTES, tasks, (800, 1100), count=4, haystack=TEXT, label="a <model>", progress=False, told=seen.append
    )
    assert seen[-1] == table and [one.rows for one in seen] == [table.rows[: n + 1] for n in range(4)]
    assert [(row["task"], row["length"]) for row in table.rows] == [(t, n) for t in tasks for n in (800, 1100)]
    first, last = table.rows[0], table.rows[-1]
    assert (first["score"], first["stderr"], first["forced_exact"], first["forced_tokens"]) == (1, 0, 1, 1)
    assert (last["score"], last["forced_exact"], last["log_likelihood"]) == (0, 0, -1)
    assert last["log_likelihood_per_token"] == pytest.approx(-4 / (4 * len(made("niah_single", 1100)[0].answer_ids)))
    assert len(table.examples) == 16 and table.examples[-1]["output"] == "no"
    lines = str(table).splitlines()
    assert lines[0].split()[:5] == ["task", "length", "count", "metric", "score"] and len({*map(len, lines)}) == 1
    assert lines[1].split()[:5] == ["mqar", "800", "4", "recall", "1.000"]
    assert "<caption>a &lt;model&gt;</caption>" in table._repr_html_() and table._repr_html_().count("<tr>") == 5
    table.save(tmp_path / "evals.json")
    assert evals.Table.load(tmp_path / "evals.json").to_dict() == json.loads(json.dumps(table.to_dict()))
    figure = table.plot(tmp_path / "evals.png")
    assert (tmp_path / "evals.png").read_bytes().startswith(b"\x89PNG")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(tasks)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1, 1]
    both = evals.plot_scores({"a": table, "b": table})
    assert [text.get_text() for text in both.legends[0].get_texts()][:2] == ["a: mqar", "a: niah_single"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"nosa-jax\[pandas\]"):
        table.to_dataframe()


def test_no_two_tasks_look_alike():
    row = {"length": 1024, "score": 1.0, "stderr": None}
    figure = evals.Table("nosa", [row | {"task": task} for task in evals.TASKS], [], {}).plot()
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in figure.axes[0].lines}
    assert len(looks) == len(evals.TASKS) > 7


def test_what_is_not_asked_for_is_not_measured(cheating):
    model = lively_model(small_config())
    options = {"tasks": ("mqar",), "lengths": (800,), "count": 1, "progress": False}
    (row,) = evals.evaluate(model, BYTES, generation=False, **options).rows
    assert row["score"] is row["stderr"] is None and row["forced_exact"] == 1
    table = evals.evaluate(model, BYTES, teacher_forcing=False, difficulty={"mqar": {"queries": 2}}, **options)
    assert table.rows[0]["score"] == 1 and table.rows[0]["log_likelihood"] is None
    assert len(table.examples[0]["depths"]) == 2 and " - " in str(table).splitlines()[1]
    assert table.plot() and evals.evaluate(model, BYTES, generation=False, **options).plot()


def test_prompts_are_read_as_is_asked_for(monkeypatch):
    asked = []

    def generate(model, tokens, lengths, *, max_new_tokens, dense, **_):
        asked.append(dense)
        return nosa_jax.Generation(np.zeros((len(tokens), max_new_tokens), np.int32), np.ones(len(tokens), np.int32))

    monkeypatch.setattr("nosa_jax.evals.scoring.generate", generate)
    monkeypatch.setattr("nosa_jax.evals.evaluation.score_answers", None)  # dense prompts are not scored so
    options = {"tasks": ("mqar",), "lengths": (800,), "count": 1, "progress": False}
    table = evals.evaluate(lively_model(small_config()), BYTES, prefill="dense", **options)
    evals.evaluate(lively_model(small_config()), BYTES, teacher_forcing=False, **options)
    assert asked == [True, False] and table.settings["prefill"] == "dense"
    assert table.rows[0]["log_likelihood"] is None


def test_data_frames(cheating):
    pandas = pytest.importorskip("pandas")
    table = evals.evaluate(lively_model(small_config()), BYTES, ("mqar",), (800,), count=1, progress=False)
    frame = table.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and frame.loc[0, "score"] == 1


@pytest.mark.slow
def test_a_model_is_evaluated_by_itself_and_by_teacher_forcing():
    """What it says itself, put in front of it, it finds likeliest throughout; batches and the cache change nothing."""
    model = lively_model(small_config())
    examples = evals.make("mqar", 300, BYTES, 3, queries=1)
    said = evals.answer(model, BYTES, examples, cache=OFFLOADED, stop_tokens=())
    assert said == evals.answer(model, BYTES, examples, batch_size=1, stop_tokens=())
    assert all(said)
    own = [dataclasses.replace(e, answer_ids=tuple(BYTES.encode(text))) for e, text in zip(examples, said, strict=True)]
    forced = evals.score_answers(model, own)
    assert [one.tokens for one in forced] == [e.room for e in examples]
    assert all(one.is_exact for one in forced)
    alone = evals.score_answers(model, own, batch_size=1, chunk=16)
    np.testing.assert_allclose([one.log_likelihood for one in forced], [one.log_likelihood for one in alone], rtol=1e-4)
    stops = [model.config.vocab_size - 1, own[0].answer_ids[2]]
    cut = evals.answer(model, BYTES, examples[:1], stop_tokens=stops)[0]
    assert cut == BYTES.decode(own[0].answer_ids[: own[0].answer_ids.index(stops[1])])
    options = {"cache": OFFLOADED, "difficulty": {"mqar": {"queries": 1}}}
    table = evals.evaluate(model, BYTES, ("mqar",), (300,), count=2, **options)
    assert table.rows[0]["log_likelihood_per_token"] < 0 and table.examples[1]["output"] is not None


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "needle"}, "task: must be one of niah_single, "),
        ({"length": 100}, "length: must hold the smallest example of niah_single"),
        ({"length": 0}, "length: must be >= 1"),
        ({"count": 0}, "count: must be >= 1"),
        ({"seed": -1}, "seed: must be >= 0"),
        ({"depth": 2}, "depth: must lie between 0.0 and 1.0"),
        ({"value": "letter"}, "value: must be 'number', 'word' or 'uuid'"),
        ({"keys": 3}, "difficulty: must name options of niah_single .depth=None, value='number'., got 'keys'"),
        ({"task": "niah_multikey", "keys": 0}, "keys: must be >= 1"),
        ({"task": "common_words", "repeats": 3, "noise_repeats": 3}, "noise_repeats: must be < repeats = 3"),
        ({"task": "frequent_words", "alpha": 0.5}, "alpha: must lie between 1.0 and 10.0"),
        ({"haystack": " \n"}, "haystack: must hold text"),
        ({"haystack": __file__}, "haystack: must be text, not the name of a file"),
        ({"haystack": 5}, "haystack: must be a str"),
        ({"chat": True}, "template: must be given"),
        ({"chat": True, "template": "{% for %}"}, "template: must be a Jinja template"),
        ({"tokenizer": "gpt2"}, "tokenizer: must be a tokenizer of nosa_jax.hf"),
    ],
)
def test_refusals_of_make(options, message, without_type_checker):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        evals.make(**({"task": "niah_single", "length": 900, "tokenizer": BYTES, "haystack": TEXT} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model: must be a NosaLM"),
        ({"tasks": "mqar"}, "tasks: must be a sequence"),
        ({"tasks": ()}, "tasks: must not be empty"),
        ({"tasks": ("mqar", "nothing")}, "task: must be one of"),
        ({"lengths": 900}, "lengths: must be a sequence"),
        ({"lengths": (900, 90)}, "length: must hold the smallest example of mqar"),
        ({"count": 0}, "count: must be >= 1"),
        ({"batch_size": 0}, "batch_size: must be >= 1"),
        ({"chunk": 0}, "chunk: must be >= 1"),
        ({"cache": 3}, "cache: must be a CacheConfig"),
        ({"generation": False, "teacher_forcing": False}, "generation: or teacher_forcing must be True"),
        ({"prefill": "full"}, "prefill: must be 'sparse' or 'dense'"),
        ({"prefill": "dense", "teacher_forcing": True}, "teacher_forcing: must be False with prefill="),
        ({"cache": POLICY, "teacher_forcing": True}, "teacher_forcing: must be False with a policy"),
        ({"prefill": "dense", "generation": False}, "generation: or teacher_forcing must be True"),
        ({"difficulty": {"kv_json": {}}}, "difficulty: must be by tasks that are asked for"),
        ({"difficulty": {"mqar": {"keys": 1}}}, "difficulty: must name options of mqar"),
        ({"chat": True}, "template: must be given, as the model comes without a chat template"),
    ],
)
def test_refusals_of_evaluate(options, message, without_type_checker, monkeypatch):
    monkeypatch.setattr("nosa_jax.evals.evaluation.answer", None)  # nothing runs
    given = {"model": lively_model(small_config()), "tokenizer": BYTES, "tasks": ("mqar",), "lengths": (900,)} | options
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        evals.evaluate(**given, progress=False)


def test_tables_of_other_files_are_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="must have the keys"):
        evals.Table.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="tables: must hold at least one row"):
        evals.plot_scores({})
