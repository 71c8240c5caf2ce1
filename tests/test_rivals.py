"""The comparison of policies: what a run is, the line between two speeds, and the table."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax
from experiments.rivals import figure, losses, quality, speed
from experiments.rivals.repeated_heads import repeated_heads
from nosa_jax import AttentionConfig, CacheConfig, baselines, evals
from nosa_jax.policy import Sizes


def test_a_run_is_a_policy_or_a_variant():
    policy = baselines.ShadowKV(rank=16, budget=64)
    assert speed.Run.parse("shadowkv:512:2:rank=16,budget=64") == speed.Run("full", 512, 2, CacheConfig(policy=policy))
    found = speed.Run.parse("arkvale:512:2:device")
    assert found.cache == CacheConfig(offload=False, policy=baselines.ArkVale()) and found.variant == "full"
    assert speed.Run.parse("nosa:512:2:72") == speed.Run("nosa", 512, 2, CacheConfig(slots=72))
    assert speed.Run.parse("full:512:2:device").cache == CacheConfig(offload=False)
    found = speed.Run.parse("full:512:2:device:repeated")
    assert found.repeated and not found.cache.offload


@pytest.mark.parametrize("text", ["arkvale:512:2:repeat", "arkvale:512:2:80", "nosa:512:2:rank=4"])
def test_what_no_run_takes_is_refused(text):
    with pytest.raises(ValueError, match=f"--runs: .* got '{text}'"):
        speed.Run.parse(text)


def test_a_kv_head_for_every_query_head_is_the_same_function():
    config = dataclasses.replace(small_config(attention=AttentionConfig(variant="full")), qkv_bias=True)
    model = lively_model(config)
    tokens = random_tokens(2, 40)
    repeated = repeated_heads(model)
    expected, ours = (nosa_jax.forward(one, tokens).logits for one in (model, repeated))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
    assert (repeated.config.num_kv_heads, repeated.config.group_size) == (model.config.num_heads, 1)
    cache = CacheConfig(policy=baselines.ArkVale(page=8, budget=6, page_topks=4, sink=1, window=2))
    stored = [nosa_jax.plan(one.config, 2, 200, cache, prompt=160, new=40).host_bytes for one in (model, repeated)]
    assert stored[1] == model.config.group_size * stored[0]
    assert speed.Run.parse("arkvale:512:2:repeated").repeated
    with pytest.raises(ValueError, match="must be dense"):
        repeated_heads(nosa_jax.with_attention(model, variant="infllmv2"))


def test_policies_attend_to_a_quarter_of_what_the_comparison_has():
    """1,024 of 8K tokens where it is 4,096."""
    attended = lambda p: p.budget + (p.local_chunks + p.outlier_chunks) * p.chunk
    assert attended(quality.SHADOWKV) == attended(quality.LARGE_CHUNKS) == attended(baselines.ShadowKV()) / 4 == 1024
    assert quality.ARKVALE.page * quality.ARKVALE.budget == 1024
    blocks = quality.CASES["infllmv2, not trained"][1]
    assert blocks["num_selected_blocks"] * blocks["block_size"] == 1024
    sizes = Sizes(layers=30, rows=1, kv_heads=3, dim=64, prompt=8192, new=64, max_length=8256)
    quality.SHADOWKV.check(sizes)


def entry(run, still, moving):
    ends = {name: {"fetched": x, "step_ms": ms} for name, (x, ms) in {"still": still, "moving": moving}.items()}
    return {"run": run} | ends


def test_losses_are_those_of_the_whole_text_where_all_of_it_is_attended_to():
    """The engine's under `full`, and InfLLM's with a window that everything fits in."""
    model = lively_model(small_config(attention=AttentionConfig(variant="full")))
    tokens = jnp.asarray(random_tokens(2, 50))
    expected = -evals.log_likelihood(model, tokens)[:, -9:]
    policy = baselines.InfLLM(block=8, n_init=4, n_local=64, topk=2, max_cached=2, exc=16, rep=2)
    on_engine = losses.decoded(model, tokens, CacheConfig(offload=False), steps=9)
    for ours, fetched in (on_engine, losses.replayed(model, tokens, policy, steps=9)):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
        assert fetched == 0
    small = baselines.InfLLM(block=8, n_init=4, n_local=8, topk=1, max_cached=1, exc=8, rep=2)
    ours, fetched = losses.replayed(model, tokens, small, steps=9)
    assert np.abs(ours - expected).max() > 1e-3 and fetched > 0


def test_what_is_fed_of_a_repetition_stands_in_the_prompt():
    rows = np.arange(2 * (losses.PROMPT + losses.STEPS), dtype=np.int32).reshape(2, -1)  # no two tokens alike
    found = losses.repetitions(rows)
    assert found.shape == rows.shape
    before, again = np.split(found, [losses.PROMPT - losses.CUE], axis=1)
    np.testing.assert_array_equal(again, rows[:, [losses.BEGIN]] + np.arange(losses.CUE + losses.STEPS))
    assert np.isin(again, before).all()


def test_a_quarter_of_the_text_is_attended_to_in_losses():
    names = ("shadowkv", "shadowkv, chunks of 64", "arkvale", "infllm")
    *shadows, arkvale, infllm = (losses.CASES[name][0].policy for name in names)
    attended = {
        *(shadow.budget + (shadow.local_chunks + shadow.outlier_chunks) * shadow.chunk for shadow in shadows),
        arkvale.page * arkvale.budget,
        losses.BLOCKS["num_selected_blocks"] * 64,
        infllm.n_init + infllm.n_local + infllm.topk * infllm.block,
    }
    assert attended == {losses.PROMPT // 4}


def test_speeds_lie_on_a_line():
    assert figure.step_ms(entry("x", (10, 5.0), (20, 7.0)), 15) == 6.0
    assert figure.step_ms(entry("x", (0, 5.0), (0, 5.5)), 0) == 5.0  # nothing is ever fetched


def test_the_table_has_all_that_answered(tmp_path, capsys):
    speeds = [entry("full:16384:16:device", (0, 8.0), (0, 8.0)), entry("shadowkv:16384:16", (80, 16.0), (120, 24.0))]
    scores = {"niah_single": 1.0, "niah_multikey": 0.5, "niah_multivalue": 0.0, "mqar": 0.25}
    rows = [{"task": task, "score": score} for task, score in scores.items()]
    names = {"full": None, "shadowkv, chunks of 8": 25.0, "arkvale": 0.5, "another": 1.0}
    answers = [{"name": name, "fetched": fetched, "tasks": rows} for name, fetched in names.items()]
    files = {
        "speed": {"entries": [*speeds, {"run": "arkvale:16384:16", "failed": "x"}]},
        "quality": {"entries": answers},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = figure.points(files["speed"], files["quality"])
    assert found["full"]["tokens_per_second"] == 2000 and found["full"]["needles"] == pytest.approx(0.5)
    assert found["shadowkv, chunks of 8"]["fetched"] == 100.0  # 384 chunks where the small model wants 96
    assert found["shadowkv, chunks of 8"]["tokens_per_second"] == 800
    assert "tokens_per_second" not in found["arkvale"] and "tokens_per_second" not in found["another"]
    paths = [f"--{name}={tmp_path / name}" for name in files]
    figure.main([*paths, f"--output={tmp_path / 'figure.png'}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[3] == "| shadowkv, chunks of 8 | 800 | 1.00 | 0.50 | 0.00 | 0.25 |"
    assert (tmp_path / "figure.png").is_file()
