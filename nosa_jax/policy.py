"""What a policy of another system says of itself, so that prompts and decode steps of a `full` model can run by it.

The engine knows no policy: it holds what one keeps without looking into it, moves units between host memory and a pool
on the device, and asks. Every method works on arrays of all layers and a `layer`, as the ops do: a slice of a large
stack would be a copy.

Shapes: L layers, B rows, K KV heads, N query heads, D head dim, T prompt tokens, U units of a row in the store, J
wanted units of a step, `parts` 1 where values alone are stored and 2 with keys (index 0).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float, Int32


class Sizes(NamedTuple):
    """What decides the shapes of a cache. prompt: T, of the longest prompt with its padding. new: tokens that any row
    may generate. max_length: tokens that any row may hold. dim: D."""

    layers: int
    rows: int
    kv_heads: int
    dim: int
    prompt: int
    new: int
    max_length: int


class Store(NamedTuple):
    """Where units are: pool, the slots on the device; host, pages of every unit in `pinned_host` memory, None where
    the pool holds all of them and slot = unit; page_table, the page of each row's units, None without `host`;
    transport, see `CacheConfig`."""

    pool: Float[Array, "L B K slots parts unit D"]
    host: Any
    page_table: Any
    transport: str = "auto"


class Prompted(NamedTuple):
    """What the prompts leave behind in one layer.

    kept: what the policy made, with rows first. units: the first ones of a row, at least those that prompts fill; the
    first `stored` of them go to the store. resident: the unit in each slot of the pool where it does not hold all, -1
    for none. ids: wanted by the prompt's last query.
    """

    kept: Any
    units: Float[Array, "B K U parts unit D"]
    stored: Int32[Array, " B"]
    resident: Int32[Array, "B K slots"]
    ids: Int32[Array, "B K J"]


class Stepped(NamedTuple):
    """What a step did in one layer.

    kept: of all layers. pool: see `Store`. out: of attention. ids: the wanted units, -1 for none. fetched: units
    that crossed from the host; none without one, where new_ids still says which were not wanted before. scores and
    attended, [B, K or 1, ...], say why and what was attended to: positions of tokens, -1 for none. What nobody
    reads of these costs nothing.
    """

    kept: Any
    pool: Float[Array, "L B K slots parts unit D"]
    out: Float[Array, "B N D"]
    ids: Int32[Array, "B K J"]
    new_ids: Int32[Array, "B K J"]
    fetched: Int32[Array, "B K"]
    scores: Float[Array, "B #K units"]
    attended: Int32[Array, "B #K A"]


class Policy:
    """Base of the policies: a frozen dataclass of settings that `CacheConfig(policy=...)` takes."""

    refusal: ClassVar[str | None] = None
    """Why the engine cannot run it; None where it can."""

    fetch_share: ClassVar[float] = 0.0
    """Units that cross per step, as a share of those that are wanted: what `plan` expects. Measured where a model of
    135M read source code at 8K with a quarter of the default settings (`experiments.rivals.quality`)."""

    @property
    def unit(self) -> int:
        """Tokens of a unit of the store."""
        raise NotImplementedError

    @property
    def parts(self) -> int:
        """1 where values alone are stored, 2 with keys."""
        raise NotImplementedError

    @property
    def num_slots(self) -> int:
        """Units of the pool where not all are on the device."""
        raise NotImplementedError

    @property
    def num_wanted(self) -> int:
        """J, units that a step wants."""
        raise NotImplementedError

    @property
    def num_attended(self) -> int:
        """Tokens of a prompt that a step attends to where there are more."""
        raise NotImplementedError

    def num_units(self, sizes: Sizes) -> int:
        """U."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raises ValueError where a model's shape does not go with the settings."""

    def empty(self, sizes: Sizes, dtype: Any) -> Any:
        """What is kept on the device beside the pool, zeros: arrays [L, B, ...] that `read_prompt` fills."""
        raise NotImplementedError

    def read_bytes(self, kept: Any) -> int:
        """What of `kept` a step reads, in bytes of all layers and rows; the pool's units come on top."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

    def sizes_of(self, kept: Any) -> dict[str, int]:
        """Those of `Sizes` that only what is kept can tell: `prompt` and `new`; {} where they decide no shape."""
        return {}

    def read_prompt(
        self,
        k_pre: Any,
        k_post: Float[Array, "B K T D"],
        v: Float[Array, "B K T D"],
        q_last: Float[Array, "B N D"],
        lengths: Int32[Array, " B"],
        sizes: Sizes,
    ) -> Prompted:
        """Of one layer of prompts, whose attention is dense.

        k_pre, k_post: keys before and after RoPE; what lies behind a row's length counts for nothing. q_last: after
        RoPE, of each row's last token. A policy that does not look at k_pre may be given None.
        """
        raise NotImplementedError

    def decode(
        self,
        kept: Any,
        store: Store,
        rotations: Any,
        token: tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"]],
        positions: Int32[Array, " B"],
        layer: Int32[Array, ""],
    ) -> Stepped:
        """One layer of one token per row, which sees itself: append, score, select, make resident, attend.

        rotations: `nosa_jax.rope.Rotations` of every position that `rotated` names. token: query and key after RoPE,
        value. positions: -1 for rows without a token, which stay as they are.
        """
        raise NotImplementedError

    def rotated(self, kept: Any) -> int:
        """For how many positions `decode` needs rotations."""
        return 0

    def filled(
        self, kept: Any, positions: Int32[Array, " B"]
    ) -> tuple[Int32[Array, "L B heads X"], Int32[Array, "L B heads X"]] | None:
        """(units, slots) that the tokens at `positions` filled, which go to the host; None where tokens never do."""
        return None
