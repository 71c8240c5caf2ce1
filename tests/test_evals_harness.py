"""The model for lm-eval: against lm-eval's own backend (`experiments/golden_lm_eval.py`), and request by request."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import lively_model, small_config

import nosa_jax
from experiments.golden_lm_eval import MAX_LENGTH, run, write_model, write_tasks
from nosa_jax import CacheConfig
from nosa_jax.hf import ByteTokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "lm_eval.json"
pytest.importorskip("lm_eval")


def requests(*arguments):
    """What lm-eval hands over, as far as a model looks at it."""
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("lm_eval") / "model")


@pytest.fixture
def harness():
    from nosa_jax.evals import harness

    return harness


@pytest.fixture
def lm(harness):
    return harness.NosaJax(lively_model(small_config()), ByteTokenizer(), batch_size=2, max_length=64, max_gen_toks=8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it uses
def test_results_are_those_of_lm_evals_own_backend(folder, harness, tmp_path, monkeypatch):
    """Multiple choice, perplexity in windows, generation with stop strings; three tasks of local data, no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = nosa_jax.from_pretrained(folder)
    assert model.config.attention.variant == "full" and model.stop_tokens == (0,)
    lm = harness.NosaJax(model, load_tokenizer(folder, 128), batch_size=4, max_length=MAX_LENGTH)
    found, expected = run(lm, write_tasks(tmp_path / "tasks")), json.loads(GOLDEN.read_text())
    assert set(found) == set(expected) == {"local_choices", "local_rolling", "local_generate"}
    for name, theirs in expected.items():
        ours = found[name]
        assert ours["results"] == pytest.approx(theirs["results"], rel=1e-3), name
        if name == "local_generate":
            assert ours["responses"] == theirs["responses"]
            continue
        for a, b in zip(ours["responses"], theirs["responses"], strict=True):
            if name == "local_choices":
                assert [greedy for _, greedy in a] == [greedy for _, greedy in b]
                a, b = ([likely for likely, _ in row] for row in (a, b))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_answers_come_in_the_order_of_requests_whatever_the_batches(harness, lm):
    model = lm.model
    alone = harness.NosaJax(model, ByteTokenizer(), batch_size=1, max_length=64, chunk=8, cache=CacheConfig(slots=8))
    texts = ["a", "a longer text", "middling", "", "x" * 90]
    pairs = requests(*((text, f" {n} is next") for n, text in enumerate(texts)))
    ours, theirs = lm.loglikelihood(pairs, disable_tqdm=True), alone.loglikelihood(pairs, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in ours], [a for a, _ in theirs], rtol=1e-4)
    assert all(likely < 0 and not greedy for likely, greedy in ours)
    rolling = requests(*((text,) for text in ["ab" * 100, "", "xyz"]))
    ours = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    np.testing.assert_allclose(ours, alone.loglikelihood_rolling(rolling, disable_tqdm=True), rtol=1e-4)
    assert ours[1] == 0 > ours[0]
    asked = requests(*((text, {"until": ["\n\n"], "max_gen_toks": 8}) for text in texts), ("a", {"max_gen_toks": 3}))
    said = lm.generate_until(asked, disable_tqdm=True)
    assert said == alone.generate_until(asked, disable_tqdm=True)
    assert said[5] == said[0][:3] and len(said[5]) == 3
    # What was said is greedy; a text ends before the first of its stop strings, or of the model's stop tokens.
    assert lm.loglikelihood(requests(("a", said[0])), disable_tqdm=True)[0][1]
    stop = said[0][2]
    cut = lm.generate_until(requests(("a", {"until": ["never", stop]})), disable_tqdm=True)
    assert cut == [said[0].partition(stop)[0]]
    drawn = [{"do_sample": True, "temperature": 2.0, "top_k": 40, "max_gen_toks": 8}] * 3
    drawn = [(text, how) for text, how in zip(texts, drawn, strict=False)]
    twice = [one.generate_until(requests(*drawn), disable_tqdm=True) for one in (lm, alone)]
    assert twice[0] == twice[1] != said[:3]


@pytest.mark.slow
def test_models_are_made_by_name(folder, harness):
    from lm_eval.api.registry import get_model

    kind = get_model("nosa_jax")
    assert kind is harness.NosaJax
    arguments = f"pretrained={folder},max_length=64,variant=infllmv2,slots=70"
    with pytest.warns(UserWarning, match="nothing is sparse"):
        lm = kind.create_from_arg_string(arguments, {"batch_size": "auto", "device": "cuda", "max_batch_size": None})
    assert (lm.batch_size, lm.max_length, lm.cache.slots) == (None, 64, 70)
    assert lm.model.config.attention.variant == "infllmv2" and lm.prefix_token_id == lm.eot_token_id == 0
    with pytest.raises(ValueError, match="pretrained: must name a folder"):
        kind.create_from_arg_obj({})


def test_manners_of_generation(lm, harness):
    manner = lm._manner({"until": "stop", "temperature": 0.5})
    assert manner.until == ("stop",) and manner.new == 8 and manner.sampling.temperature == 0.5
    greedy = [{"do_sample": False, "temperature": 1.0}, {"temperature": 0}, {}, {"do_sample": True, "temperature": 0}]
    assert all(lm._manner(how).sampling is nosa_jax.decode.GREEDY for how in greedy)
    manner = lm._manner({"do_sample": True, "top_p": 0.9, "until": ["", "a"], "max_new_tokens": 5})
    assert (manner.sampling.temperature, manner.sampling.top_p, manner.until, manner.new) == (1.0, 0.9, ("a",), 5)
    with pytest.raises(ValueError, match=r"generation_kwargs: must be among .*got \['num_beams'\]"):
        lm._manner({"num_beams": 2})
    with pytest.raises(ValueError, match="max_gen_toks: must leave room"):
        lm._manner({"max_gen_toks": 64})
    with pytest.raises(ValueError, match="continuation: must be of 1 to max_length = 64"):
        lm.loglikelihood(requests(("a", "x" * 65)), disable_tqdm=True)
    assert harness._cut("one END two", ("two", "END")) == "one "


def test_chats_and_special_tokens(lm, harness):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    chat = harness.NosaJax(lm.model, ByteTokenizer(), max_length=64, template=template)
    said = [{"role": "user", "content": "hi"}]
    assert chat.apply_chat_template(said) == "[user]hi[end][assistant]"
    said.append({"role": "assistant", "content": "well,"})
    assert chat.apply_chat_template(said, add_generation_prompt=False) == "[user]hi[end][assistant]well,"
    assert chat.chat_template(True) and not chat.chat_template(False)
    with pytest.raises(ValueError, match="template: must be given"):
        lm.apply_chat_template(said)
    assert lm.prefix_token_id == ord("\n") and lm.tok_encode("\n1") == [10, 49]
    assert lm._context("", 8) == [10] and lm._context("x" * 80, 8) == [ord("x")] * 56
    from test_evals import subwords

    with_start = harness.NosaJax(lm.model, subwords(), max_length=64, prefix_token_id=0)
    assert with_start.tok_encode("Line")[0] == 0 and with_start.tok_encode("<s>Line").count(0) == 1
    assert with_start.tok_encode("Line", add_special_tokens=False)[0] != 0
    assert with_start.tok_decode(with_start.tok_encode("Line")) == "Line"
    with pytest.raises(ValueError, match="prefix_token_id: must be given"):
        _ = harness.NosaJax(lm.model, subwords()).prefix_token_id
