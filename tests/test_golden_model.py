"""The whole model against the published reference code (see golden/README.md): logits and every selection."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nosa_jax import forward, generate
from nosa_jax.hf import from_pretrained
from nosa_jax.model import NosaLM

GOLDEN = Path(__file__).parent / "golden"
# The reference's "8 / 128 / 1 / 2": 8 blocks in all, a window of 128 tokens beside the own block, 1 sink, 2 - 1 picks.
REDUCED = {"num_selected_blocks": 8, "num_local_blocks": 3, "num_sink_blocks": 1, "num_query_blocks": 1}
CASES = {
    "g4_red_1500": ("tiny_g4", "nosa"),
    "g16_red_1500": ("tiny_g16", "nosa"),
    "infllmv2_g4_red_1500": ("tiny_g4", "infllmv2"),
    "dense_g4_1500": ("tiny_g4", "full"),
    "g4_short_200": ("tiny_g4", "nosa"),
}
SPARSE = [case for case in CASES if not case.startswith("dense")]
TOLERANCE = 1e-4  # two correct float32 runs differ by about 1e-5
MARGIN = 1e-6  # below it, rounding may decide a selection


@functools.cache
def read(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cases" / f"{case}.npz") as file:
        return dict(file)


@functools.cache
def load(name: str, variant: str, reduced: bool = True) -> NosaLM:
    return from_pretrained(GOLDEN / "models" / name, variant=variant, attention=REDUCED if reduced else None)


def load_for(case: str) -> NosaLM:
    return load(*CASES[case], reduced=case != "g4_short_200")


run = jax.jit(forward, static_argnames=("logits", "record"))


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=TOLERANCE)


def as_sets(ids, blocks: int) -> np.ndarray:
    """Block ids [..., J], padded with -1, as membership [..., blocks]."""
    ids = np.asarray(ids)
    return (ids[..., None] == np.arange(blocks)).any(-2)


def unpack(bits: np.ndarray, blocks: int) -> np.ndarray:
    return np.unpackbits(bits, axis=-1, bitorder="little")[..., :blocks].astype(bool)


def decided(arrays: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """Where both stages of the reference's selection were clear of rounding; exact ties count as clear."""
    margins = [arrays[f"{prefix}.{name}"] for name in ("margin_qk", "margin_final") if f"{prefix}.{name}" in arrays]
    return np.all([margin > MARGIN for margin in margins], axis=0)


def first_flip(case: str, block_ids) -> int:
    """Position of the first prompt token whose selection in layer 0 a near-tie decided otherwise, T without one.

    One row of g4_red_1500 has a margin of 7e-8. Whichever way it falls is right, and later tokens see the difference.
    """
    arrays = read(case)
    length = arrays["input_ids"].shape[1]
    if case not in SPARSE:
        return length
    blocks = -(-length // 64)
    other = (as_sets(block_ids[0, 0], blocks) != unpack(arrays["L0.sel_bits"], blocks)).any(-1)
    return int(np.min(np.nonzero(other & ~decided(arrays, "L0"))[1], initial=length))


@pytest.mark.parametrize("case", CASES)
def test_prompt(case):
    arrays = read(case)
    out = run(load_for(case), jnp.asarray(arrays["input_ids"]), record=True)
    settled = first_flip(case, out.block_ids)
    positions = arrays["positions"][0]
    settled_positions = positions < settled
    close(out.logits[:, positions[settled_positions]], arrays["logits"][:, settled_positions])
    if case not in SPARSE:
        assert out.block_ids is None
        return
    blocks = -(-arrays["input_ids"].shape[1] // 64)
    for layer in range(2):
        clear = decided(arrays, f"L{layer}")
        assert clear.mean() > 0.999
        if layer > 0:
            clear &= np.arange(clear.shape[-1]) < settled
        ours, theirs = as_sets(out.block_ids[layer, 0], blocks), unpack(arrays[f"L{layer}.sel_bits"], blocks)
        np.testing.assert_array_equal(ours[clear], theirs[clear])


def test_prompt_with_the_reference_selections():
    """No near-tie can decide anything here: all positions must agree."""
    arrays, model = read("g4_red_1500"), load("tiny_g4", "nosa")
    chosen = np.stack([unpack(arrays[f"L{layer}.sel_bits"], 24) for layer in range(2)])[:, None]
    ids = np.sort(np.where(chosen, np.arange(24), 24), axis=-1)[..., :8]
    ids = jnp.asarray(np.where(ids == 24, -1, ids).astype(np.int32))
    out = run(model, jnp.asarray(arrays["input_ids"]), block_ids=ids)
    close(out.logits[:, arrays["positions"][0]], arrays["logits"])
    close(out.logits[:, -1], arrays["prefill_last_logits"])


@pytest.mark.parametrize(("shortest", "longest"), [(16, 321), pytest.param(511, 1089, marks=pytest.mark.slow)])
def test_lengths_around_every_boundary(shortest, longest):
    """All lengths as rows of one padded batch, so that this also shows that a row is what it would be alone."""
    arrays, model = read("edge_nosa_reduced"), load("tiny_g4", "nosa")
    lengths = sorted(int(name[1:].split(".")[0]) for name in arrays if name.endswith(".last_logits"))
    lengths = [n for n in lengths if shortest <= n <= longest]
    assert lengths[0] == shortest and lengths[-1] == longest
    tokens = jnp.tile(jnp.asarray(arrays["input_ids"]), (len(lengths), 1))[:, :longest]
    out = run(model, tokens, jnp.asarray(lengths), logits="last", record=True)
    close(out.logits[:, 0], np.concatenate([arrays[f"n{n}.last_logits"] for n in lengths]))
    ids = np.asarray(out.block_ids)
    for row, n in enumerate(lengths):
        blocks = -(-n // 64)
        for layer in range(2):
            theirs = unpack(arrays[f"n{n}.L{layer}.sel_bits"], blocks)
            np.testing.assert_array_equal(as_sets(ids[layer, row, :, :n], blocks), theirs, err_msg=f"length {n}")
        assert np.all(ids[:, row, :, n:] == -1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "g4_short_200"])
def test_decoding_forced_tokens(case):
    arrays, model = read(case), load_for(case)
    tokens, forced = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["dec.ids"])
    out = generate(model, tokens, max_new_tokens=forced.shape[1], forced_tokens=forced, record=True)
    np.testing.assert_array_equal(np.asarray(out.tokens), np.asarray(forced))
    if "prefill_last_logits" in arrays:
        if case == "g4_red_1500":
            difference = np.abs(np.asarray(out.logits[:, 0]) - arrays["prefill_last_logits"]).max()
            if TOLERANCE < difference < 0.1:
                pytest.skip(
                    "a near-tie of the prompt (margin 7e-8, see first_flip) falls the other way on this machine"
                )
        close(out.logits[:, 0], arrays["prefill_last_logits"])
    close(out.logits[:, 1:], arrays["dec.logits"].swapaxes(0, 1))
    if case not in SPARSE:
        assert out.block_ids is None
        return
    for layer in range(2):
        theirs = arrays[f"dec.L{layer}.topk_idx"][:, :, 0].swapaxes(0, 1)  # from [steps, K, 1, k]
        ours = np.asarray(out.block_ids[layer, 0, :, 1:])
        clear = decided(arrays, f"dec.L{layer}")[:, :, 0].T
        assert clear.all()  # no near-tie in the decode steps of these cases
        np.testing.assert_array_equal(as_sets(ours, 25), as_sets(theirs, 25))


@pytest.mark.slow
def test_rows_of_unequal_length_decode_as_if_alone():
    """Prompts that the reference ran one by one, as one padded batch."""
    model, edge, short = load("tiny_g4", "nosa"), read("edge_nosa_reduced"), read("g4_short_200")
    edges = (1087, 512, 31)  # the first is 1 short of a block: its steps cross into the next one
    # 200 tokens are 4 blocks: everything visible is selected, under the full parameters as under the reduced ones.
    prompts = [*(edge["input_ids"][0, :n] for n in edges), short["input_ids"][0]]
    follow = [*(edge[f"n{n}.dec_ids"][0] for n in edges), short["dec.ids"][0]]
    tokens, forced = np.zeros((4, 1087), np.int32), np.zeros((4, 9), np.int32)
    for row in range(4):
        tokens[row, : len(prompts[row])] = prompts[row]
        forced[row, : len(follow[row])] = follow[row]
    lengths = jnp.asarray([len(prompt) for prompt in prompts])
    out = generate(
        model, jnp.asarray(tokens), lengths, max_new_tokens=9, forced_tokens=jnp.asarray(forced), record=True
    )
    close(out.logits[3], np.concatenate([short["prefill_last_logits"], short["dec.logits"][:, 0]]))
    for row, n in enumerate(edges):
        close(out.logits[row, :4], np.concatenate([edge[f"n{n}.last_logits"], edge[f"n{n}.dec_logits"][:, 0]]))
        for layer in range(2):
            for step in range(3):
                theirs = as_sets(edge[f"n{n}.dec{step}.L{layer}.topk_idx"][:, 0], 24)
                np.testing.assert_array_equal(as_sets(out.block_ids[layer, row, :, 1 + step], 24), theirs)
