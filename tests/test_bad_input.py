"""Bad input: every message names the argument, the rule, the value and the remedy, before any work is done."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import lively_model, small_config

import nosa_jax
from nosa_jax import AttentionConfig, CacheConfig, CacheTooLargeError, ModelConfig, RopeConfig, Sampling

pytestmark = pytest.mark.usefixtures("without_type_checker")

OK = np.zeros((2, 20), np.int32)


def model():
    return lively_model(small_config())


def attention(**fields):
    return lambda: AttentionConfig(**fields)


def small(**fields):
    base = dict(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8
    )
    return lambda: ModelConfig(**(base | fields))


def forward(*args, **options):
    return lambda: nosa_jax.forward(model(), *args, **options)


def generate(*args, **options):
    return lambda: nosa_jax.generate(model(), *args, **options)


def prefill(*args, **options):
    return lambda: nosa_jax.prefill(model(), *args, **options)


@functools.cache
def running():
    """A state of two rows of 20 tokens with room for 4 more."""
    return nosa_jax.prefill(model(), OK, max_length=24)[0]


def full():
    return dataclasses.replace(running(), lengths=jnp.array([24, 20]))


IDS = np.zeros((2, 2, 2, 20, 8), np.int32)
IDS[..., 1:] = -1
LATE = IDS.copy()
LATE[..., 0] = 1
UNSORTED = IDS.copy()
UNSORTED[..., 1] = 0


def longrope(**fields):
    return RopeConfig(
        kind="longrope", **(dict(short_factor=(1.0,), long_factor=(1.0,), original_max_context=4) | fields)
    )


def on_device(state):
    """As pickling and `jax.device_put` leave it."""
    return jax.device_put(jax.device_get(state))


def pinned(state):
    return dataclasses.replace(state, pool=jax.device_put(state.pool, jax.memory.Space.Host))


# name: (call, what the message must say: argument, rule, value)
CASES = {
    # prompts
    "empty prompt": (forward(np.zeros((1, 0), np.int32)), "tokens", "at least one token", "(1, 0)"),
    "empty batch": (prefill(np.zeros((0, 4), np.int32), max_length=8), "tokens", "at least one token", "(0, 4)"),
    "zero length": (forward(OK, np.array([0, 3])), "lengths", "must be in [1", "0 for row 0"),
    "token too large": (forward(np.full((1, 4), 128)), "tokens", "vocab_size = 128", "128 at index (0, 0)"),
    "negative token": (generate(np.array([[1, -1]])), "tokens", "[0, vocab_size", "-1 at index (0, 1)"),
    "lengths beyond tokens": (forward(OK, np.array([3, 21])), "lengths", "tokens.shape[1] = 20", "21 for row 1"),
    "lengths of another batch": (forward(OK, np.array([3])), "lengths", "must have shape", "[1]"),
    "rank 1 tokens": (forward(OK[0]), "tokens", "[B, T]", "(20,)"),
    "rank 3 tokens": (generate(OK[None]), "tokens", "[B, T]", "(1, 2, 20)"),
    "float tokens": (forward(OK.astype(np.float32)), "tokens", "integers", "float32"),
    "float lengths": (forward(OK, np.array([3.0, 4.0])), "lengths", "integers", "float64"),
    "unknown logits": (forward(OK, logits="some"), "logits", "'all', 'last' or 'none'", "'some'"),
    "unaligned document": (
        forward(OK, segment_ids=np.repeat([[0] * 5 + [1] * 15], 2, 0)), "segment_ids", "multiple of", "token 5"
    ),
    "segment_ids of another shape": (forward(OK, segment_ids=OK[:, :3]), "segment_ids", "[B, T]", "[2, 3]"),
    # replayed selections
    "ids of another shape": (forward(OK, block_ids=IDS[:1]), "block_ids", "[L, B, K, T, J]", "[1, 2, 2, 20, 8]"),
    "ids after the query": (forward(OK, block_ids=LATE), "block_ids", "own block", "break"),
    "repeated ids": (forward(OK, block_ids=UNSORTED), "block_ids", "without repeats", "break"),
    "float ids": (forward(OK, block_ids=IDS.astype(float)), "block_ids", "integers", "float64"),
    "forced ids without the own block": (
        generate(OK, max_new_tokens=20, forced_block_ids=IDS), "forced_block_ids", "own block", "without it"
    ),
    "forced tokens of another shape": (
        generate(OK, max_new_tokens=4, forced_tokens=OK), "forced_tokens", "[B, max_new_tokens]", "[2, 20]"
    ),
    # AttentionConfig
    "unknown variant": (attention(variant="dense"), "AttentionConfig.variant", "one of", "'dense'"),
    "one local block": (attention(num_local_blocks=1), "num_local_blocks", ">= pooling_window", "1 with block size 64"),
    "no local block": (attention(num_local_blocks=0), "num_local_blocks", ">= 1", "0"),
    "negative sink": (attention(num_sink_blocks=-1), "num_sink_blocks", ">= 0", "-1"),
    "negative query blocks": (attention(num_query_blocks=-1), "num_query_blocks", ">= 0", "-1"),
    "more forced than selected": (attention(num_selected_blocks=32), "num_selected_blocks", "num_sink_blocks", "32 <"),
    "stride does not divide": (attention(block_size=40), "block_size", "multiple of pooling_stride", "40"),
    "window is not two strides": (attention(pooling_window=48), "pooling_window", "2 * pooling_stride", "48"),
    "a stride beyond the kernels": (
        attention(pooling_stride=2048, pooling_window=4096, block_size=4096), "pooling_stride", "<= 1024", "2048"
    ),
    "blocks beyond the kernels": (attention(num_selected_blocks=2**20), "num_selected_blocks", "<= 65536", "1048576"),
    "a float count": (attention(num_selected_blocks=64.0), "num_selected_blocks", "int", "64.0"),
    "unknown attention key": (
        lambda: nosa_jax.with_attention(model(), topk=3), "attention", "keys must be among", "topk"
    ),
    # ModelConfig
    "heads not divisible": (small(num_heads=3), "num_heads", "multiple of num_kv_heads", "3 heads and 2"),
    "odd head_dim": (small(head_dim=7), "head_dim", "even", "7"),
    "no layers": (small(num_layers=0), "num_layers", ">= 1", "0"),
    "unknown rope": (lambda: RopeConfig(kind="dynamic"), "RopeConfig.kind", "'llama3', 'yarn'", "'dynamic'"),
    "longrope without factors": (lambda: RopeConfig(kind="longrope"), "RopeConfig", "short_factor", "None"),
    "too few longrope factors": (
        small(rope=RopeConfig(kind="longrope", short_factor=(1.0,), long_factor=(1.0,), original_max_context=4)),
        "short_factor", "head_dim / 2 = 4", "got 1",
    ),
    # cache
    "slots smaller than J": (
        generate(OK, cache=CacheConfig(slots=7)), "CacheConfig.slots", "num_selected_blocks = 8", "7"
    ),
    "slots without offload": (
        lambda: CacheConfig(offload=False, slots=9), "CacheConfig.slots", "offload=True", "slots=9"
    ),
    "slots for full attention": (
        lambda: nosa_jax.plan(small_config().with_attention(variant="full"), 1, 8, CacheConfig(slots=9)),
        "CacheConfig.slots", "'full'", "9",
    ),
    "unknown transport": (lambda: CacheConfig(transport="nvlink"), "CacheConfig.transport", "'device_put'", "'nvlink'"),
    "offload is not a bool": (lambda: CacheConfig(offload=1), "CacheConfig.offload", "bool", "1"),
    "no batch": (lambda: nosa_jax.plan(small_config(), 0, 8), "batch", ">= 1", "0"),
    "half a row": (lambda: nosa_jax.plan(small_config(), 1.5, 8), "batch", "must be a whole number >= 1", "1.5"),
    "misses below 0": (lambda: nosa_jax.plan(small_config(), 1, 8, misses=-1), "misses", "between 0.0 and 8.0", "-1"),
    "more misses than J": (lambda: nosa_jax.plan(small_config(), 1, 8, misses=9), "misses", "between 0.0 and 8.0", "9"),
    "no link": (
        lambda: nosa_jax.plan(small_config(), 1, 8, link_bytes_per_second=0),
        "link_bytes_per_second",
        "must be above 0",
        "0",
    ),
    "a broken chunk": (generate(OK, chunk=1.5), "chunk", "must be an int >= 1 or None", "1.5"),
    # running
    "max_length below the prompt": (prefill(OK, max_length=19), "max_length", ">= tokens.shape[1] = 20", "19"),
    "limits of another batch": (prefill(OK, max_length=[24]), "max_length", "one per row, [B] = [2]", "got 1 of them"),
    "limits of two axes": (prefill(OK, max_length=np.full((2, 1), 24)), "max_length", "one per row", "(2, 1)"),
    "a limit below the prompt": (
        prefill(OK, max_length=[24, 19]), "max_length", "row's prompt", "19 for row 1 of 20 tokens"
    ),
    "half a limit": (prefill(OK, max_length=[24, 24.5]), "max_length[1]", "must be an int", "24.5"),
    "planned limits of another batch": (lambda: nosa_jax.plan(small_config(), 3, [8, 8]), "max_length", "[3]", "got 2"),
    "chunk of zero": (prefill(OK, max_length=30, chunk=0), "chunk", ">= 1", "0"),
    "no new tokens": (generate(OK, max_new_tokens=0), "max_new_tokens", ">= 1", "0"),
    "step of another batch": (
        lambda: nosa_jax.decode_step(model(), running(), np.zeros(3, np.int32)), "tokens", "state's 2 rows", "3"
    ),
    "step with rank 2": (lambda: nosa_jax.decode_step(model(), running(), OK), "tokens", "[B]", "(2, 20)"),
    "step beyond max_length": (
        lambda: nosa_jax.decode_step(model(), full(), np.zeros(2, np.int32)), "tokens", "max_length = 24", "25"
    ),
    "extend beyond max_length": (
        lambda: nosa_jax.extend(model(), running(), OK[:, :5]), "tokens", "max_length = 24", "25"
    ),
    "extend by a bad token": (
        lambda: nosa_jax.extend(model(), running(), OK[:, :2] + 128), "tokens", "vocab_size", "128"
    ),
    # wrong kinds of things
    "a config for a model": (lambda: nosa_jax.generate(small_config(), OK), "model", "must be a NosaLM", "ModelConfig"),
    "an array for a model": (lambda: nosa_jax.forward(OK, OK), "model", "must be a NosaLM", "ndarray"),
    "a model for a config": (lambda: nosa_jax.plan(model(), 1, 8), "config", "must be a ModelConfig", "NosaLM"),
    "a name for a config": (lambda: nosa_jax.NosaLM("tiny", rngs=nnx.Rngs(0)), "config", "a ModelConfig", "'tiny'"),
    "a seed for rngs": (lambda: nosa_jax.NosaLM(small_config(), rngs=0), "rngs", "must be a Rngs", "int 0"),
    "a dict for a cache": (generate(OK, cache={"slots": 9}), "cache", "must be a CacheConfig", "dict"),
    "a number for sampling": (generate(OK, sampling=0.8), "sampling", "must be a Sampling", "float 0.8"),
    "a seed for a key": (generate(OK, sampling=Sampling(temperature=1.0), key=0), "key", "random key", "int 0"),
    "one stop token": (generate(OK, stop_tokens=10), "stop_tokens", "sequence", "10"),
    "text as stop tokens": (generate(OK, stop_tokens=["a"]), "stop_tokens", "integers", "text"),
    "text as tokens": (forward("hello"), "tokens", "integers", "text"),
    "ragged lists": (forward([[1, 2], [3]]), "tokens", "rectangular", "inhomogeneous"),
    "a float count of tokens": (generate(OK, max_new_tokens=5.0), "max_new_tokens", "must be an int", "5.0"),
    # sampling
    "temperature without a key": (
        generate(OK, sampling=Sampling(temperature=0.7)), "key", "temperature 0.7 needs a random key", "None"
    ),
    "keys of another batch": (
        generate(OK, sampling=Sampling(temperature=1.0), key=jnp.zeros((3, 2), jnp.uint32)), "key", "[2]", "(3,)"
    ),
    "negative temperature": (lambda: Sampling(temperature=-1.0), "Sampling.temperature", ">= 0", "-1.0"),
    "top_k of zero": (lambda: Sampling(top_k=0), "Sampling.top_k", ">= 1", "0"),
    "top_p of zero": (lambda: Sampling(top_p=0.0), "Sampling.top_p", "(0, 1]", "0.0"),
    "stop token out of range": (generate(OK, stop_tokens=[500]), "stop_tokens", "vocab_size = 128", "500"),
    "pad token out of range": (generate(OK, pad_token=-1), "pad_token", "vocab_size = 128", "-1"),
    "unknown record": (generate(OK, record=["logit"]), "record", "names among", "logit"),
    "nested stop tokens": (generate(OK, stop_tokens=[[13, 10]]), "stop_tokens", "one flat sequence", "(1, 2)"),
    "ragged stop tokens": (generate(OK, stop_tokens=[[13, 10], [5]]), "stop_tokens", "rectangular", "inhomogeneous"),
    "arrays as stop tokens": (generate(OK, stop_tokens=[np.array([1, 2])]), "stop_tokens", "flat", "(1, 2)"),
    "bool stop tokens": (generate(OK, stop_tokens=[True, 10]), "stop_tokens", "integers", "True"),
    "text of stop tokens": (generate(OK, stop_tokens=["\n"]), "stop_tokens", "integers", "text"),
    "one text of stop tokens": (generate(OK, stop_tokens="\n"), "stop_tokens", "sequence of token ids", "tokenizer"),
    "huge stop token": (generate(OK, stop_tokens=[2**32 + 5]), "stop_tokens", "int32", str(2**32 + 5)),
    "half a pad token": (generate(OK, pad_token=1.9), "pad_token", "int", "1.9"),
    "no pad token": (generate(OK, pad_token=None), "pad_token", "int", "None"),
    "bool pad token": (generate(OK, pad_token=True), "pad_token", "int", "True"),
    "bool count of tokens": (generate(OK, max_new_tokens=True), "max_new_tokens", "int", "True"),
    "text max_length": (prefill(OK, max_length="24"), "max_length", "int", "'24'"),
    "record a number": (generate(OK, record=5), "record", "names among", "5"),
    "no record": (generate(OK, record=None), "record", "names among", "None"),
    "record in forward": (forward(OK, record="block_ids"), "record", "True or False", "'block_ids'"),
    "remat in forward": (forward(OK, remat=None), "remat", "True or False", "None"),
    "key of floats": (generate(OK, sampling=Sampling(1.0), key=np.array([0.0, 1.0])), "key", "random key", "float64"),
    "key of another width": (
        generate(OK, sampling=Sampling(1.0), key=np.zeros(3, np.uint32)), "key", "random key", "uint32[3]"
    ),
    "no temperature": (lambda: Sampling(None), "Sampling.temperature", "number", "None"),
    "text temperature": (lambda: Sampling("hot"), "Sampling.temperature", "number", "'hot'"),
    "bool temperature": (lambda: Sampling(True), "Sampling.temperature", "number", "True"),
    "half a top_k": (lambda: Sampling(1.0, top_k=1.5), "Sampling.top_k", "int", "1.5"),
    "no top_p": (lambda: Sampling(1.0, top_p=None), "Sampling.top_p", "number", "None"),
    "empty rows": (forward([[], []]), "tokens", "at least one token", "(2, 0)"),
    "no tokens": (forward(None), "tokens", "integers", "NoneType"),
    "a set of tokens": (forward({1, 2}), "tokens", "integers", "set"),
    "tokens that wrap": (forward(np.full((1, 4), 2**32 - 1, np.uint32)), "tokens", "int32", str(2**32 - 1)),
    "ids of floats in lists": (forward(OK, block_ids=(IDS + 0.5).tolist()), "block_ids", "integers", "float64"),
    "text as ids": (forward(OK, block_ids="auto"), "block_ids", "integers", "text"),
    "forced ids of None": (
        generate(OK, max_new_tokens=1, forced_block_ids=[None]), "forced_block_ids", "integers", "None"
    ),
    # configurations
    "NaN eps": (small(rms_norm_eps=float("nan")), "ModelConfig.rms_norm_eps", "between", "nan"),
    "negative eps": (small(rms_norm_eps=-1e-6), "ModelConfig.rms_norm_eps", "between", "-1e-06"),
    "text eps": (small(rms_norm_eps="1e-6"), "ModelConfig.rms_norm_eps", "number", "'1e-6'"),
    "no eps": (small(rms_norm_eps=None), "ModelConfig.rms_norm_eps", "number", "None"),
    "a variant for a config": (small(attention="nosa"), "ModelConfig.attention", "an AttentionConfig", "'nosa'"),
    "a dict for rope": (small(rope={"theta": 1e4}), "ModelConfig.rope", "must be a RopeConfig", "dict"),
    "tied by a number": (small(tie_embeddings=1), "ModelConfig.tie_embeddings", "True or False", "1"),
    "infinite theta": (lambda: RopeConfig(theta=float("inf")), "RopeConfig.theta", "between", "inf"),
    "theta beyond float32": (lambda: RopeConfig(theta=1e300), "RopeConfig.theta", "between", "1e+300"),
    "no theta": (lambda: RopeConfig(theta=0), "RopeConfig.theta", "between", "0"),
    "text theta": (lambda: RopeConfig(theta="1e4"), "RopeConfig.theta", "number", "'1e4'"),
    "a factor of zero": (lambda: longrope(long_factor=(1.0, 0.0)), "RopeConfig.long_factor[1]", "between", "0.0"),
    "a NaN factor": (lambda: longrope(short_factor=(float("nan"),)), "RopeConfig.short_factor[0]", "between", "nan"),
    "one factor": (lambda: longrope(short_factor=4.0), "RopeConfig.short_factor", "sequence of numbers", "4.0"),
    "a number of factors": (
        lambda: longrope(long_factor=np.array(4.0)), "RopeConfig.long_factor", "sequence of numbers", "4."
    ),
    "text factors": (lambda: longrope(long_factor="4.0"), "RopeConfig.long_factor", "sequence of numbers", "'4.0'"),
    "no original context": (lambda: longrope(original_max_context=0), "RopeConfig.original_max_context", ">= 2", "0"),
    "negative attention factor": (
        lambda: longrope(attention_factor=-1.0), "RopeConfig.attention_factor", "between", "-1.0"
    ),
    "an array as rope kind": (lambda: RopeConfig(kind=np.zeros(2)), "RopeConfig.kind", "'llama3', 'yarn'", "0."),
    "an array as variant": (attention(variant=np.zeros(2)), "AttentionConfig.variant", "one of", "0."),
    "an array as transport": (lambda: CacheConfig(transport=np.zeros(2)), "CacheConfig.transport", "'auto'", "0."),
    "text batch": (lambda: nosa_jax.plan(small_config(), "1", 8), "batch", "whole number", "'1'"),
    "NaN batch": (lambda: nosa_jax.plan(small_config(), float("nan"), 8), "batch", "whole number", "nan"),
    "countless rows": (lambda: nosa_jax.plan(small_config(), 10**400, 8), "batch", "below 2**62", "more"),
    "rows beyond any list": (
        lambda: nosa_jax.generate(model(), OK, max_new_tokens=10**30), "max_length", "below 2**62", "more"
    ),
    "a number as dtype": (lambda: nosa_jax.cast(model(), np.float32(2)), "dtype", "float", "2.0"),
    "no dtype": (lambda: nosa_jax.cast(model(), None), "dtype", "float", "None"),
    "parameters of a config": (lambda: nosa_jax.num_parameters(small_config()), "model", "NosaLM", "ModelConfig"),
    "NaN misses": (lambda: nosa_jax.plan(small_config(), 1, 8, misses=float("nan")), "misses", "and finite", "nan"),
    "a dict for a planned cache": (lambda: nosa_jax.plan(small_config(), 1, 8, {}), "cache", "a CacheConfig", "dict"),
    "weights of integers": (
        lambda: nosa_jax.NosaLM(small_config(), rngs=nnx.Rngs(0), dtype=jnp.int8), "dtype", "float", "int8"
    ),
    "cast to integers": (lambda: nosa_jax.cast(model(), jnp.int8), "dtype", "float", "int8"),
    "cast to nonsense": (lambda: nosa_jax.cast(model(), "float33"), "dtype", "float", "'float33'"),
    "cast of a config": (lambda: nosa_jax.cast(small_config(), "float32"), "model", "must be a NosaLM", "ModelConfig"),
    "planned in integers": (lambda: nosa_jax.plan(small_config(), 1, 8, dtype=int), "dtype", "float", "int"),
    # states
    "state on the device": (
        lambda: nosa_jax.decode_step(model(), on_device(running()), OK[:, 0]), "state", "host memory", "host"
    ),
    "state of NumPy arrays": (
        lambda: nosa_jax.extend(model(), jax.device_get(running()), OK[:, :2]), "state", "host memory", "host"
    ),
    "state in host memory": (
        lambda: nosa_jax.decode_step(model(), pinned(running()), OK[:, 0]), "state", "device memory", "pool"
    ),
    "state with a hole": (
        lambda: nosa_jax.decode_step(model(), dataclasses.replace(running(), pool=None), OK[:, 0]),
        "state", "pool must be an array", "None",
    ),
    "state of plain tuples": (
        lambda: nosa_jax.decode_step(model(), dataclasses.replace(running(), table=tuple(running().table)), OK[:, 0]),
        "state", "SlotTable as table", "tuple",
    ),
    "state of text": (
        lambda: nosa_jax.decode_step(model(), dataclasses.replace(running(), table="a"), OK[:, 0]),
        "state", "whose table has", "'a'",
    ),
    "state without a length": (
        lambda: nosa_jax.decode_step(model(), dataclasses.replace(running(), max_length=None), OK[:, 0]),
        "state.max_length", "int", "None",
    ),
    "state of lists": (
        lambda: nosa_jax.decode_step(model(), dataclasses.replace(running(), lengths=[20, 20]), OK[:, 0]),
        "state", "lengths must be an array", "20",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, *said = CASES[name]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    message = str(error.value)
    for part in said:
        assert part in message, message
    assert message.count(". ") >= 1 and message.endswith("."), f"no remedy in: {message}"


@pytest.mark.parametrize(
    ("cache", "what"), [(CacheConfig(), "host store"), (CacheConfig(offload=False), "device pool")]
)
def test_a_cache_that_does_not_fit_is_refused_with_numbers(cache, what):
    for call in (
        lambda: nosa_jax.prefill(model(), OK, max_length=2**34, cache=cache),
        lambda: nosa_jax.generate(model(), OK, max_new_tokens=2**34, cache=cache),
    ):
        with pytest.raises(
            CacheTooLargeError, match=rf"{what} must fit .* GB needed and .* GB available .* max_length"
        ):
            call()


def test_values_are_not_looked_at_under_jit():
    """Inside jit only shapes are checked; out-of-range tokens cannot be seen."""

    out = jax.jit(nosa_jax.forward)(model(), np.full((1, 4), 127))
    assert out.logits.shape == (1, 4, 128)
    with pytest.raises(ValueError, match="tokens"):
        jax.jit(nosa_jax.forward)(model(), np.zeros((4,), np.int32))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_layers": 3}, r"state: must go with the model, whose pool has \['float32\[3, "),
        ({"variant": "infllmv2"}, "state: must go with the model, whose importance has "),
        ({"variant": "full"}, "state: must go with the model, whose pool has "),
        ({"block_size": 32, "num_local_blocks": 2}, "state: must go with the model, whose pool has "),
        ({"num_selected_blocks": 12}, "state: must hold one selection of the model, 12 blocks, got 8 slots"),
        ({"dtype": jnp.bfloat16}, r"state: must go with the model, whose pool has \['bfloat16"),
    ],
)
def test_a_state_of_another_model(other, message):
    state = nosa_jax.prefill(model(), OK, max_length=240, cache=CacheConfig(slots=8))[0]
    if "num_layers" in other:
        wrong = lively_model(small_config(layers=3))
    elif "dtype" in other:
        wrong = nosa_jax.cast(model(), jnp.bfloat16)
    else:
        wrong = nosa_jax.with_attention(model(), **other)
    for call in (lambda: nosa_jax.decode_step(wrong, state, OK[:, 0]), lambda: nosa_jax.extend(wrong, state, OK)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("function", ["prefill", "extend", "decode_step", "generate"])
def test_transforms_are_refused(function, jitted):
    state, token = running(), OK[:, :1]
    calls = {
        "prefill": lambda model, tokens: nosa_jax.prefill(model, tokens, max_length=24)[1],
        "extend": lambda model, tokens: nosa_jax.extend(model, state, tokens)[1],
        "decode_step": lambda model, tokens: nosa_jax.decode_step(model, state, tokens[:, 0])[1],
        "generate": lambda model, tokens: nosa_jax.generate(model, tokens, max_new_tokens=2, record=["logits"]).logits,
    }
    call = jax.jit(calls[function]) if jitted else calls[function]
    with pytest.raises(TypeError, match=r"vmap.*rows.*batch"):
        jax.vmap(call, (None, 0))(model(), token[None])
    with pytest.raises(TypeError, match=r"gradient.*nosa_jax\.forward"):
        jax.grad(lambda model: call(model, token).sum())(model())


def test_a_model_that_is_no_part_of_the_gradient_decodes():
    def loss(model):
        state, _ = nosa_jax.prefill(jax.lax.stop_gradient(model), OK, max_length=24)
        return model.norm[...].sum() * state.lengths[0]

    assert (jax.jit(jax.grad(loss))(model()).norm[...] == 20).all()
