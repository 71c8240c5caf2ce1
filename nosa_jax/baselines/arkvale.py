"""ArkVale (NeurIPS 2024; pku-liang/ArkVale at 0c3b45e), one layer.

Keys and values live in host memory in pages; a fixed number of pages of each row is also on the device, and all of
those are attended to. One selection serves all heads of a row.

1. A prompt leaves behind (`read_prompt`): all pages, a digest of each but the last, and which pages are resident: the
   first ones, the last ones, and between them the best for the prompt's last query.
2. A token is appended (`open_page`, `append`). Where it opens a page, the page before gets its digest, and the oldest
   page of the window leaves the device if that is full.
3. Queries score the digests (`score`): the largest dot product with a point of the box around a page's keys, the mean
   over all heads. `select` wants the best `num_wanted` pages between sinks and window, as soon as not all pages fit.
4. Wanted pages that are not resident come; as many residents leave, those of the lowest score (`exchange`).
5. Attended are all residents (`attended_tokens`), not only those that were wanted.

The box is a cuboid around the middle of the keys, (max + min) / 2 of each channel, its half width the mean distance of
the page's keys from it. Unlike the original: K KV heads as the model has them (the published comparison repeats keys
and values to all N heads); positions count from 0 in decoding too, as the NOSA paper's copy of it has them (the
original's kernel rotates generated tokens at the next position); scores stay float32 (the original rounds those of
heads to float16 before their mean); rows of their own lengths. Its setting of several groups of heads with selections
of their own is not here.

Shapes: B rows, T prompt tokens, S = P * page room for tokens, P for pages, K KV heads, N query heads, D head dim,
C pages on the device, k wanted pages.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.baselines import common
from pallas_kernels.checks import bad_value, require_size


@dataclasses.dataclass(frozen=True)
class ArkVale:
    """Which pages ArkVale keeps and wants (NeurIPS 2024); the defaults are those of the NOSA paper's comparison.

    page: tokens per page.
    budget: pages on the device, all of which are attended to.
    page_topks: pages that a step uses in the original's count: sinks, window but one, and the wanted ones.
    sink: first pages, always resident. window: last pages, the open one among them, always resident.

    Raises TypeError or ValueError where a value makes no sense.
    """

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
    def num_wanted(self) -> int:
        """Pages that a step wants between sinks and window, k."""
        return self.page_topks - self.sink - (self.window - 1)

    @property
    def prompt_sink(self) -> int:
        """First pages that a prompt keeps, two even where there are fewer sinks (as the original has it)."""
        return max(2, self.sink)


@pytree_dataclass
class ArkValeState:
    """What one layer remembers while it decodes.

    keys, values [B, K, S, D]: every token; in an engine all pages are in host memory, the residents on the device.
    centers, radii float32 [B, K, P, D]: the digests, middle and half width of the boxes; 0 for pages without one.
    resident [B, C]: the page in each slot of the device, -1 for none.
    """

    keys: Any
    values: Any
    centers: Any
    radii: Any
    resident: Any


@pytree_dataclass
class ArkValeStep:
    """What a step did, ids ascending, -1 behind: ids [B, k] of the wanted pages, none where all pages fit; new_ids
    [B, k] those of them that came over the link and left_ids [B, k] the pages that made room for them; rolled_out [B]
    the page that left the window and with it the device, or -1; scores [B, P]; attended [B, A] positions in the order
    of slots, -1 where nothing is; out [B, N, D]."""

    ids: Any
    new_ids: Any
    left_ids: Any
    rolled_out: Any
    scores: Any
    attended: Any
    out: Any


def digest(keys: Float[Array, "*rows page D"]) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """Center and radius, float32, of the box of a full page of keys after RoPE."""
    keys = keys.astype(jnp.float32)
    center = (keys.max(-2) + keys.min(-2)) / 2
    return center, jnp.abs(center[..., None, :] - keys).mean(-2)


def read_prompt(
    policy: ArkVale,
    k_post: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    q_last: Float[Array, "B N D"],
    lengths: Int32[Array, " B"],
    max_new: int,
) -> ArkValeState:
    """What prompts leave behind, whose attention is dense.

    k_post: keys after RoPE; what lies behind a row's length counts for nothing. q_last: after RoPE, of each row's last
    token. max_new: room for generated tokens.
    """
    batch, heads, tokens, dim = k_post.shape
    pages = max(-(-(tokens + max_new) // policy.page), policy.budget)
    wider = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, pages * policy.page - tokens), (0, 0)))
    keys, values = wider(k_post), wider(v)
    boxes = digest(keys.reshape(batch, heads, pages, policy.page, dim))
    # The last page is open, even where it is exactly full.
    closed = jnp.arange(pages) < common.num_units(lengths, policy.page)[:, None] - 1
    centers, radii = (jnp.where(closed[:, None, :, None], box, 0) for box in boxes)
    state = ArkValeState(keys, values, centers, radii, jnp.zeros((batch, policy.budget), jnp.int32))
    return dataclasses.replace(state, resident=_prompt_residents(policy, score(state, q_last), lengths))


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


def open_page(
    policy: ArkVale, state: ArkValeState, positions: Int32[Array, " B"]
) -> tuple[ArkValeState, Int32[Array, " B"]]:
    """Makes room for the tokens at `positions`, which may be the first of their pages; says who left, -1 for nobody.

    The page before gets its digest (in an engine it goes to the host now). A slot that is free is taken; else that of
    the oldest page of the window.
    """
    page = positions // policy.page
    opens = positions % policy.page == 0
    done = common.unit_tokens(jnp.maximum(page - 1, 0)[:, None, None], policy.page)
    center, radius = digest(common.take_tokens(state.keys, done))
    place = jnp.where(opens, page - 1, state.centers.shape[2])
    write = lambda boxes, box: boxes.at[common.rows_of(place), :, place].set(box, mode="drop")

    held = (state.resident >= 0).sum(1)
    full = held >= policy.budget
    oldest = page - policy.window
    slot = jnp.where(full, jnp.argmax(state.resident == oldest[:, None], axis=1), held)
    takes = opens[:, None] & (jnp.arange(policy.budget) == slot[:, None])
    state = dataclasses.replace(
        state,
        centers=write(state.centers, center),
        radii=write(state.radii, radius),
        resident=jnp.where(takes, page[:, None], state.resident),
    )
    return state, jnp.where(opens & full, oldest, -1)


def append(
    state: ArkValeState, k_post: Float[Array, "B K D"], v: Float[Array, "B K D"], positions: Int32[Array, " B"]
) -> ArkValeState:
    """A token per row, into a page that `open_page` made room for; one beyond the room is dropped."""
    put = lambda store, token: common.put_tokens(store, token[:, :, None], positions[:, None])
    return dataclasses.replace(state, keys=put(state.keys, k_post), values=put(state.values, v))


def score(state: ArkValeState, q: Float[Array, "B N D"]) -> Float[Array, "B P"]:
    """float32: the mean over all heads of the largest q . x, x in the box of a page; no scale, no softmax.

    The largest is q . center + |q| . radius, so that the heads of a KV head may be summed first.
    """
    batch, heads, dim = q.shape
    q = q.reshape(batch, state.centers.shape[1], -1, dim).astype(jnp.float32)
    dot = lambda x, boxes: jnp.einsum("bkd,bkpd->bp", x.sum(2), boxes, precision="highest")
    return (dot(q, state.centers) + dot(jnp.abs(q), state.radii)) / heads


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


def attended_tokens(
    policy: ArkVale, resident: Int32[Array, "B C"], positions: Int32[Array, " B"]
) -> Int32[Array, "B A"]:
    """Positions in the order of slots, up to the row's own; -1 where nothing is."""
    tokens = common.unit_tokens(resident, policy.page)
    return jnp.where(tokens <= positions[:, None], tokens, -1)


def decode(
    policy: ArkVale,
    state: ArkValeState,
    positions: Int32[Array, " B"],
    q: Float[Array, "B N D"],
    k_post: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
) -> tuple[ArkValeState, ArkValeStep]:
    """One token per row at `positions`, its query and key after RoPE; it sees itself."""
    state, rolled_out = open_page(policy, state, positions)
    state = append(state, k_post, v, positions)
    scores = score(state, q)
    ids = select(policy, scores, positions)
    resident, came, left = exchange(policy, state.resident, ids, scores, positions)
    attended = attended_tokens(policy, resident, positions)
    at = attended[:, None]
    out = common.attend(q, common.take_tokens(state.keys, at), common.take_tokens(state.values, at), at >= 0)
    state = dataclasses.replace(state, resident=resident)
    step = ArkValeStep(ids, came, common.ascending(left), rolled_out, scores, attended, out)
    return state, step
