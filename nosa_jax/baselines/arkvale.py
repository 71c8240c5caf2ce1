"""ArkVale (NeurIPS 2024; pku-liang/ArkVale at 0c3b45e), one layer.

Keys and values live in host memory in pages; a fixed number of pages of each row is also on the device, and all of
those are attended to. One selection serves all heads of a row.

1. A prompt leaves behind (`read_prompt`): all pages, a digest of each but the last, and which pages are resident: the
   first ones, the last ones, and between them the best for the prompt's last query.
2. A token is appended. Where it opens a page (`open_page`), the page before gets its digest, and the oldest page of the
   window leaves the device if that is full.
3. Queries score the digests (`score`): the largest dot product with a point of the box around a page's keys, the mean
   over all heads. `select` wants the best `num_wanted` pages between sinks and window, as soon as not all pages fit.
4. Wanted pages that are not resident come; as many residents leave, those of the lowest score (`exchange`).
5. Attended are all residents, not only those that were wanted. A page that a token fills goes to host memory.

The box is a cuboid around the middle of the keys, (max + min) / 2 of each channel, its half width the mean distance of
the page's keys from it. Unlike the original: K KV heads as the model has them (the published comparison repeats keys
and values to all N heads); positions count from 0 in decoding too, as the NOSA paper's copy of it has them (the
original's kernel rotates generated tokens at the next position); scores stay float32 (the original rounds those of
heads to float16 before their mean); rows of their own lengths. Its setting of several groups of heads with selections
of their own is not here.

Shapes: L layers, B rows, T prompt tokens, P room for pages, p tokens of a page, K KV heads, N query heads, D head dim,
C pages on the device, k wanted pages.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.baselines import common
from nosa_jax.policy import Policy, Prompted, Sizes, Stepped, Store
from pallas_kernels import Residence, Token, update_and_attend
from pallas_kernels import Store as KernelStore
from pallas_kernels.checks import bad_value, require_size


@dataclasses.dataclass(frozen=True)
class ArkVale(Policy):
    """Which pages ArkVale keeps and wants (NeurIPS 2024); the defaults are those of the NOSA paper's comparison.

    page: tokens per page.
    budget: pages on the device, all of which are attended to.
    page_topks: pages that a step uses in the original's count: sinks, window but one, and the wanted ones.
    sink: first pages, always resident. window: last pages, the open one among them, always resident.

    Raises TypeError or ValueError where a value makes no sense.
    """

    fetch_share: ClassVar[float] = 0.21 / 8

    page: int = 32
    budget: int = 128
    page_topks: int = 65
    sink: int = 2
    window: int = 32

    def __post_init__(self) -> None:
        for name, minimum in {"page": 1, "budget": 1, "page_topks": 1, "sink": 0, "window": 2}.items():
            object.__setattr__(self, name, require_size(f"ArkVale.{name}", getattr(self, name), minimum))
        forced = self.sink + self.window - 1
        if self.num_wanted < 1:
            rule = f"must be larger than sink + window - 1 = {forced}, or no page is ever wanted"
            raise bad_value("ArkVale.page_topks", rule, self.page_topks, f"Use page_topks={forced + 1} or more.")
        least = max(self.page_topks + 1, self.prompt_sink + self.window)
        if self.budget < least:
            rule = f"must hold sinks, window and the wanted pages, {least} pages"
            raise bad_value("ArkVale.budget", rule, self.budget, f"Use budget={least} or more.")

    @property
    def prompt_sink(self) -> int:
        """First pages that a prompt keeps, two even where there are fewer sinks (as the original has it)."""
        return max(2, self.sink)

    @property
    def num_wanted(self) -> int:
        """Pages that a step wants between sinks and window, k."""
        return self.page_topks - self.sink - (self.window - 1)

    @property
    def num_attended(self) -> int:
        return self.budget * self.page

    @property
    def unit(self) -> int:
        return self.page

    @property
    def parts(self) -> int:
        return 2

    @property
    def num_slots(self) -> int:
        return self.budget

    def num_units(self, sizes: Sizes) -> int:
        return max(-(-sizes.max_length // self.page), self.budget)

    def empty(self, sizes: Sizes, dtype: Any) -> ArkValeState:
        shape = (sizes.layers, sizes.rows, sizes.kv_heads, self.num_units(sizes), sizes.dim)
        resident = jnp.full((sizes.layers, sizes.rows, self.budget), -1, jnp.int32)
        return ArkValeState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), resident)

    def read_prompt(self, *args: Any) -> Prompted:
        return read_prompt(self, *args)

    def decode(self, *args: Any) -> Stepped:
        return decode(self, *args)

    def filled(self, kept: ArkValeState, positions: Int32[Array, " B"]) -> tuple[Array, Array]:
        done = positions % self.page == self.page - 1  # of -1, which has no page, too
        page = jnp.where(done & (positions >= 0), positions // self.page, -1)
        slots = jnp.argmax(kept.resident == page[:, None], axis=-1).astype(jnp.int32)
        return jnp.broadcast_to(page[:, None, None], (*slots.shape, 1, 1)), slots[..., None, None]


@pytree_dataclass
class ArkValeState:
    """What is remembered while decoding; in an engine with an axis L before all others.

    centers, radii float32 [B, K, P, D]: the digests, middle and half width of the boxes; 0 for pages without one.
    resident [B, C]: the page in each slot of the device, -1 for none.
    """

    centers: Any
    radii: Any
    resident: Any


def digest(keys: Float[Array, "*rows page D"]) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """Center and radius, float32, of the box of a full page of keys after RoPE."""
    keys = keys.astype(jnp.float32)
    center = (keys.max(-2) + keys.min(-2)) / 2
    return center, jnp.abs(center[..., None, :] - keys).mean(-2)


def read_prompt(
    policy: ArkVale,
    k_pre: Any,
    k_post: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    q_last: Float[Array, "B N D"],
    lengths: Int32[Array, " B"],
    sizes: Sizes,
) -> Prompted:
    """What prompts leave behind, whose attention is dense; see `Policy.read_prompt`. k_pre: not looked at.

    The last query selects nothing: which pages are resident has a rule of its own.
    """
    batch, heads, tokens, dim = k_post.shape
    # The room of a row may be many times its prompt: only digests, which are small, are made for all of it.
    room = policy.num_units(sizes)
    pages = min(room, -(-tokens // policy.page))
    wide = pages * policy.page
    wider = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max(0, wide - tokens)), (0, 0)))[:, :, :wide]
    units = jnp.stack([wider(x).reshape(batch, heads, pages, policy.page, dim) for x in (k_post, v)], axis=3)
    # The last page is open, even where it is exactly full.
    closed = (jnp.arange(pages) < common.num_units(lengths, policy.page)[:, None] - 1)[:, None, :, None]
    boxes = (jnp.where(closed, box, 0) for box in digest(units[:, :, :, 0]))
    centers, radii = (jnp.pad(box, ((0, 0), (0, 0), (0, room - pages), (0, 0))) for box in boxes)
    resident = _prompt_residents(policy, score(centers, radii, q_last), lengths)
    nothing = jnp.full((batch, heads, policy.num_wanted), -1, jnp.int32)
    kept = ArkValeState(centers, radii, resident)
    return Prompted(kept, units, lengths // policy.page, _by_head(resident, heads), nothing)


def _by_head(x: Int32[Array, "B n"], heads: int) -> Int32[Array, "B K n"]:
    return jnp.broadcast_to(x[:, None], (x.shape[0], heads, x.shape[1]))


def _prompt_residents(policy: ArkVale, scores: Float[Array, "B P"], lengths: Int32[Array, " B"]) -> Int32[Array, "B C"]:
    """The pages that a prompt leaves on the device: all where they fit, else first, best and last ones."""
    first, last = policy.prompt_sink, policy.window
    pages = common.num_units(lengths, policy.page)[:, None]
    places = jnp.arange(scores.shape[1], dtype=jnp.int32)
    middle = common.best(scores, (places >= first) & (places < pages - last), policy.budget - first - last)
    sinks = jnp.broadcast_to(jnp.arange(first, dtype=jnp.int32), (len(lengths), first))
    chosen = jnp.concatenate([sinks, middle, pages - last + jnp.arange(last, dtype=jnp.int32)], axis=1)
    every = jnp.arange(policy.budget, dtype=jnp.int32)
    return jnp.where(pages > policy.budget, chosen, jnp.where(every < pages, every, -1))


def open_page(policy: ArkVale, resident: Int32[Array, "B C"], positions: Int32[Array, " B"]) -> Int32[Array, "B C"]:
    """Makes room for the tokens at `positions`, which may be the first of their pages.

    A slot that is free is taken; else that of the oldest page of the window.
    """
    page = positions // policy.page
    opens = (positions >= 0) & (positions % policy.page == 0)
    held = (resident >= 0).sum(1)
    oldest = jnp.argmax(resident == (page - policy.window)[:, None], axis=1)
    slot = jnp.where(held >= policy.budget, oldest, held)
    takes = opens[:, None] & (jnp.arange(policy.budget) == slot[:, None])
    return jnp.where(takes, page[:, None], resident)


def close_page(
    policy: ArkVale,
    state: ArkValeState,
    store: Store,
    resident: Int32[Array, "B C"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "L B K P D"], Float[Array, "L B K P D"]]:
    """Digests of all layers, with that of the page before where the tokens at `positions` open one.

    resident: of this layer, the new pages among them. The page before is in the window, so it is resident.
    """
    before = positions // policy.page - 1
    row = common.rows_of(positions)
    slot = jnp.maximum(before, 0) if store.host is None else jnp.argmax(resident == before[:, None], axis=1)
    box = digest(store.pool.at[layer, row, :, slot, 0].get(mode="clip"))
    place = jnp.where((positions >= 0) & (positions % policy.page == 0), before, -1)
    centers, radii = (
        common.put_token(boxes, part, place, layer)
        for boxes, part in zip((state.centers, state.radii), box, strict=True)
    )
    return centers, radii


def score(
    centers: Float[Array, "B K P D"], radii: Float[Array, "B K P D"], q: Float[Array, "B N D"]
) -> Float[Array, "B P"]:
    """float32: the mean over all heads of the largest q . x, x in the box of a page; no scale, no softmax.

    The largest is q . center + |q| . radius, so that the heads of a KV head may be summed first.
    """
    batch, heads, dim = q.shape
    q = q.reshape(batch, centers.shape[1], -1, dim).astype(jnp.float32)
    # Channels first, then KV heads, as no one sum: for that XLA would turn the digests of all layers around.
    sums, sizes = (x.sum(2)[:, :, None] for x in (q, jnp.abs(q)))
    return ((sums * centers + sizes * radii).sum(3) / heads).sum(1)


def select(policy: ArkVale, scores: Float[Array, "B P"], positions: Int32[Array, " B"]) -> Int32[Array, "B k"]:
    """The wanted pages, ascending; ties to the lower page. All -1 where every page fits on the device."""
    pages = common.num_units(positions + 1, policy.page)[:, None]
    ids = common.ascending(common.best(scores, _is_middle(policy, scores, positions), policy.num_wanted))
    return jnp.where(pages > policy.budget, ids, -1)


def _is_middle(policy: ArkVale, scores: Array, positions: Array) -> Array:
    """bool [B, P]: the pages between sinks and window."""
    places = jnp.arange(scores.shape[1], dtype=jnp.int32)
    return (places >= policy.sink) & (places <= (positions // policy.page - policy.window)[:, None])


def exchange(
    policy: ArkVale,
    resident: Int32[Array, "B C"],
    ids: Int32[Array, "B k"],
    scores: Float[Array, "B P"],
    positions: Int32[Array, " B"],
) -> tuple[Int32[Array, "B C"], Int32[Array, "B k"], Int32[Array, "B k"]]:
    """Brings wanted pages: (resident, who came, who left), the last two in pairs that share a slot, -1 behind.

    Those who leave are the residents between sinks and window of the lowest score that are not wanted themselves.
    """
    came = common.compact(ids, (ids >= 0) & ~common.among(ids, resident))
    places = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    may_leave = _is_middle(policy, scores, positions) & common.among(places, resident) & ~common.among(places, ids)
    left = jnp.where(came >= 0, common.best(-scores, may_leave, policy.num_wanted), -1)
    changes = (left[:, None] >= 0) & (resident[:, :, None] == left[:, None])
    resident = jnp.where(changes.any(-1), (changes * came[:, None]).sum(-1), resident)
    return resident, came, left


def decode(
    policy: ArkVale,
    state: ArkValeState,
    store: Store,
    rotations: Any,
    token: tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"]],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> Stepped:
    """One layer of a token per row; see `Policy.decode`. state, store: of all layers. rotations: not looked at."""
    heads = store.pool.shape[2]
    resident = open_page(policy, common.at_layer(state.resident, layer), positions)
    centers, radii = close_page(policy, state, store, resident, positions, layer)
    own_centers, own_radii = common.at_layer((centers, radii), layer)
    scores = score(own_centers, own_radii, token[0])
    ids = select(policy, scores, positions)
    after, came, _ = exchange(policy, resident, ids, scores, positions)

    # In the order of pages, in which they are attended to wherever they lie.
    slots = jnp.argsort(jnp.where(after >= 0, after, jnp.iinfo(jnp.int32).max), axis=1).astype(jnp.int32)
    pages = jnp.take_along_axis(after, slots, axis=1)
    loads: Array | None = jnp.where(pages != jnp.take_along_axis(resident, slots, axis=1), pages, -1)
    if store.host is None:
        slots, loads = pages, None
    out, pool = update_and_attend(
        Token(*token),
        KernelStore(store.pool, store.host, store.page_table, None),
        Residence(_by_head(pages, heads), _by_head(slots, heads), None if loads is None else _by_head(loads, heads)),
        positions,
        layer,
        transport=store.transport,
    )
    kept = ArkValeState(centers, radii, common.put_layer(state.resident, after, layer))
    tokens = common.unit_tokens(pages, policy.page)
    attended = jnp.where(tokens <= positions[:, None], tokens, -1)
    crossed = (came >= 0) if store.host is not None else jnp.zeros_like(came, bool)
    fetched = jnp.broadcast_to(crossed.sum(1, dtype=jnp.int32)[:, None], (len(ids), heads))
    wanted, new_ids = _by_head(ids, heads), _by_head(came, heads)
    return Stepped(kept, pool, out, wanted, new_ids, fetched, scores[:, None], attended[:, None])
