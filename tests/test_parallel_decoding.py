"""`forward`, the steps of decoding and `generate` on eight devices give what they give on one.

What is judged here is found by `parallel_decoding.py`, which has the cases.
"""

from __future__ import annotations

import pytest
from eight_devices import of_case
from parallel_decoding import DECODING, FORWARD, GENERATION
from support import but_slow

EXACT = ("block_ids", "lengths", "tokens", "fetched")


def assert_same(found):
    """Integers are equal, all else is up to rounding: logits are below 10."""
    for name, difference in found["differences"].items():
        assert difference <= (0 if name in EXACT else 5e-5), (name, difference)


@pytest.mark.slow
def test_forward():
    assert_same(of_case("parallel_decoding", "few", "all"))


@pytest.mark.parametrize("name", but_slow(FORWARD, *FORWARD))
def test_forward_on_any_mesh(name):
    """All logits, the last ones or none; selections recorded; tokens from anywhere; what does not divide, too."""
    found = of_case("parallel_decoding", "forward", name)
    assert_same(found)
    assert ("block_ids" in found["differences"]) == (FORWARD[name].variant != "full")


@pytest.mark.parametrize("name", but_slow(DECODING, *DECODING))
def test_decoding_on_any_mesh(name):
    """Prefill, at once and in chunks, steps, compiled or not, and further tokens; each device its own rows.

    With limits per row every device has pages of its own, and a row that is filled anew has some of those.
    """
    found = of_case("parallel_decoding", "decoding", name)
    assert_same(found)
    # Every device has its own rows, as many devices as may; three rows are with all.
    rows = 1 if DECODING[name].rows == 3 else DECODING[name].axes.get("data", 1) * DECODING[name].axes.get("fsdp", 1)
    assert set(found["parts"].values()) == {rows}, found["parts"]


@pytest.mark.parametrize("name", but_slow(GENERATION, *GENERATION))
def test_generation_on_any_mesh(name):
    """Sampled, with a mesh of its own: every device has rows, whatever its axes are called."""
    assert_same(of_case("parallel_decoding", "generation", name))
