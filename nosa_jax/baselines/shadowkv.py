"""ShadowKV (arXiv 2410.21465; ByteDance-Seed/ShadowKV at e51904c, its accuracy class), one layer.

Values live in host memory. Keys are kept as a product of rank r of the keys before RoPE, and rebuilt on the device.

1. A prompt leaves behind (`read_prompt`): factors of its keys; its last `local_chunks` chunks and the rest of a chunk,
   exact; of the chunks before them the `outlier_chunks` whose keys agree least with their mean, exact; of all others
   the mean key after RoPE, the landmark.
2. A token is appended: exact, and never dropped, chunked or selected.
3. Queries score landmarks (`score`): softmax over the landmarks per query head, then the largest of the heads of a KV
   head. `select` takes the best; what of them was not selected in the step before must be fetched, values alone.
4. Attended are the local tokens, outliers, selected chunks and generated tokens, with the keys of selected chunks
   rebuilt at every step (`rebuilt_attention`).

Where the original disagrees with itself, this follows the class that its accuracy was measured with. So scores are
scaled by sqrt(128), whatever the head dim is (attention by sqrt(D)), and a chunk's keys are rebuilt also when it was
selected before (its fast class keeps the exact keys of the first selection for as long as a chunk stays). Unlike it:
any number of rows, each of its own length, a short one too; scores stay float32 (the original rounds them to the
model's dtype, in which many tie); and the factors come from the Gram matrix of the keys by `eigh`, not from an SVD of
the keys: the product is the same, its parts are X V and V^T where the SVD has U and S V^T.

On the device lie the factors, landmarks and exact tokens, and of the values the selected chunks, one per slot of a pool
(or all of them). Where chunks leave the selection the ones that join it take their slots.

Shapes: L layers, B rows, T prompt tokens, U room for chunks before the local part, c tokens of a chunk, K KV heads, N
query heads, D head dim, r rank, s selected and o outlier chunks, M = U - o room for landmarks, E for exact tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.baselines import common
from nosa_jax.policy import Policy, Prompted, Sizes, Stepped, Store
from nosa_jax.rope import Rotations
from pallas_kernels import Chunks, Exact, Factors, fetch_blocks, rebuilt_attention, resolve_slots, select_blocks
from pallas_kernels.checks import bad_value, require_size
from pallas_kernels.formulas import dot

_SCORE_DIM = 128  # by the root of which the original divides at any head dim


@dataclasses.dataclass(frozen=True)
class ShadowKV(Policy):
    """Which tokens ShadowKV attends to (arXiv 2410.21465); the defaults are those of the NOSA paper's comparison.

    chunk: tokens per chunk, 8 or 64 there.
    rank: of the factors of a layer's keys before RoPE, all KV heads together; at most K * D.
    budget: tokens in selected chunks, a multiple of `chunk`. local_chunks: exact chunks at the end of the prompt.
    outlier_chunks: exact chunks where a landmark would say least. Attended are budget + (local_chunks + outlier_chunks)
        * chunk tokens, the rest of the prompt's last chunk, and all that is generated.

    Raises TypeError or ValueError where a value makes no sense.
    """

    fetch_share: ClassVar[float] = 26.2 / 96

    chunk: int = 8
    rank: int = 40
    budget: int = 3072
    local_chunks: int = 32
    outlier_chunks: int = 96

    def __post_init__(self) -> None:
        least = {"chunk": 1, "rank": 1, "budget": 1, "local_chunks": 0, "outlier_chunks": 0}
        for name, minimum in least.items():
            object.__setattr__(self, name, require_size(f"ShadowKV.{name}", getattr(self, name), minimum))
        if self.budget % self.chunk:
            below = self.budget // self.chunk * self.chunk
            remedy = f"Use budget={below + self.chunk}."
            raise bad_value("ShadowKV.budget", f"must be a multiple of chunk = {self.chunk}", self.budget, remedy)

    @property
    def num_selected(self) -> int:
        """Selected chunks, s."""
        return self.budget // self.chunk

    @property
    def unit(self) -> int:
        return self.chunk

    @property
    def parts(self) -> int:
        return 1

    @property
    def num_slots(self) -> int:
        return self.num_selected

    @property
    def num_wanted(self) -> int:
        return self.num_selected

    @property
    def num_attended(self) -> int:
        return self.budget + (self.local_chunks + self.outlier_chunks) * self.chunk

    def num_units(self, sizes: Sizes) -> int:
        # Room for all outliers and one selection even where the text is short, so that no width depends on it.
        return max(sizes.prompt // self.chunk - self.local_chunks, self.outlier_chunks + self.num_selected)

    def check(self, sizes: Sizes) -> None:
        most = sizes.kv_heads * sizes.dim
        if self.rank > most:
            rule = f"must be at most K * D = {most}"
            raise bad_value("ShadowKV.rank", rule, self.rank, f"Use rank={most} or less.")

    def empty(self, sizes: Sizes, dtype: Any) -> ShadowKVState:
        rows, heads = (sizes.layers, sizes.rows), (sizes.layers, sizes.rows, sizes.kv_heads)
        units, dim = self.num_units(sizes), sizes.dim
        numbers = lambda *shape: jnp.full(shape, -1, jnp.int32)
        return ShadowKVState(
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((*rows, units, self.chunk, self.rank), dtype),
            jnp.zeros((*heads, self.rank, dim), dtype),
            Landmarks(
                jnp.zeros((*heads, units - self.outlier_chunks, dim), dtype),
                numbers(*heads, units - self.outlier_chunks),
                numbers(*heads, self.outlier_chunks),
            ),
            jnp.zeros((*heads, 2, _prompt_room(self) + sizes.new, dim), dtype),
            numbers(*heads, self.num_slots),
            numbers(*heads, self.num_slots),
        )

    def read_bytes(self, kept: ShadowKVState) -> int:
        factors, heads = kept.token_factors, kept.landmarks.ids.shape[2]
        unread = factors.size - factors.size // factors.shape[2] * self.num_selected * heads
        return super().read_bytes(kept) - unread * factors.dtype.itemsize

    def sizes_of(self, kept: ShadowKVState) -> dict[str, int]:
        units = kept.token_factors.shape[2]
        prompt = (units + self.local_chunks) * self.chunk  # or less, where the text is short
        return {"prompt": prompt, "new": kept.exact.shape[4] - _prompt_room(self)}

    def read_prompt(self, *args: Any) -> Prompted:
        return read_prompt(self, *args)

    def decode(self, *args: Any) -> Stepped:
        return decode(self, *args)

    def rotated(self, kept: ShadowKVState) -> int:
        return kept.token_factors.shape[2] * self.chunk


@pytree_dataclass
class Landmarks:
    """How the chunks of a prompt before its local ones are looked for; see `find_landmarks`.

    keys [B, K, M, D], ids [B, K, M]: mean keys and their chunks, ascending, -1 for no more. outlier_ids [B, K, o]: by
    agreement, least first, -1 for no more.
    """

    keys: Any
    ids: Any
    outlier_ids: Any


@pytree_dataclass
class ShadowKVState:
    """What is remembered while decoding; in an engine with an axis L before all others.

    prompt_lengths [B]. token_factors [B, U, c, r], head_factors [B, K, r, D]: keys before RoPE are their product.
    exact [B, K, 2, E, D]: keys and values of outliers, local tokens and generated tokens, one right after the other,
    with room for the most that any row may have.
    held, last_used [B, K, s]: the chunk in each slot of the pool and the position that selected it last, -1 for none.
    """

    prompt_lengths: Any
    token_factors: Any
    head_factors: Any
    landmarks: Landmarks
    exact: Any
    held: Any
    last_used: Any


def num_chunks(policy: ShadowKV, lengths: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Chunks of a prompt before its local part, outliers among them."""
    return jnp.maximum(lengths // policy.chunk - policy.local_chunks, 0)


def num_landmarks(policy: ShadowKV, lengths: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Chunks of a prompt that have a landmark."""
    return jnp.maximum(num_chunks(policy, lengths) - policy.outlier_chunks, 0)


def factor_keys(
    policy: ShadowKV, k_pre: Float[Array, "B K T D"], lengths: Int32[Array, " B"]
) -> tuple[Float[Array, "B T r"], Float[Array, "B K r D"]]:
    """Factors of the keys before RoPE, whose product is the closest of rank r: [T, r] times [r, D] of each head.

    Keys of all heads lie side by side, X [T, K * D]. The best r directions are eigenvectors V of X^T X, which has no
    side as long as the text; the factors are X V and V^T.
    """
    batch, heads, tokens, dim = k_pre.shape
    keys = jnp.moveaxis(k_pre, 1, 2).reshape(batch, tokens, heads * dim)
    keys = jnp.where((jnp.arange(tokens) < lengths[:, None])[..., None], keys, 0)
    gram = dot("btx,bty->bxy", keys, keys)
    _, vectors = jnp.linalg.eigh(gram)  # ascending
    vectors = vectors[..., : -policy.rank - 1 : -1]
    left = dot("btx,bxr->btr", keys.astype(jnp.float32), vectors)
    right = jnp.moveaxis(vectors.reshape(batch, heads, dim, policy.rank), 2, 3)
    return left.astype(k_pre.dtype), right.astype(k_pre.dtype)


def agreement(
    policy: ShadowKV, k_post: Float[Array, "B K T D"], lengths: Int32[Array, " B"], units: int
) -> tuple[Float[Array, "B K U D"], Float[Array, "B K U"]]:
    """float32, of the chunks before the local part: the mean key after RoPE, and the smallest cosine between it and one
    of the keys, inf where there is no such chunk."""
    exists = _exists(policy, lengths, units)
    keys = jnp.where(exists[..., None, None], chunks_of(policy, k_post, units).astype(jnp.float32), 0)
    means = keys.mean(3)
    norm = lambda x: jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8)
    dots = (means[..., None, :] * keys).sum(-1)
    cosines = (dots / (norm(means)[..., None] * norm(keys))).min(-1)
    return means, jnp.where(exists, cosines, jnp.inf)


def chunks_of(policy: ShadowKV, x: Float[Array, "B K T D"], units: int) -> Float[Array, "B K U c D"]:
    """The first `units` chunks of a prompt."""
    room = units * policy.chunk
    x = jnp.pad(x, ((0, 0), (0, 0), (0, max(0, room - x.shape[2])), (0, 0)))[:, :, :room]
    return x.reshape(*x.shape[:2], units, policy.chunk, x.shape[3])


def _exists(policy: ShadowKV, lengths: Int32[Array, " B"], units: int) -> Bool[Array, "B 1 U"]:
    """Which chunks are there before the local part."""
    return jnp.arange(units, dtype=jnp.int32) < num_chunks(policy, lengths)[:, None, None]


def find_landmarks(
    policy: ShadowKV, k_post: Float[Array, "B K T D"], lengths: Int32[Array, " B"], units: int
) -> Landmarks:
    """Outliers and landmarks of the chunks before the local part, from keys after RoPE."""
    means, cosines = agreement(policy, k_post, lengths, units)
    exists = jnp.broadcast_to(_exists(policy, lengths, units), cosines.shape)
    outlier_ids = common.best(-cosines, exists, policy.outlier_chunks)
    ids = jnp.broadcast_to(jnp.arange(units, dtype=jnp.int32), exists.shape)
    ids = common.compact(ids, exists & ~common.among(ids, outlier_ids))[..., : units - policy.outlier_chunks]
    landmarks = jnp.take_along_axis(means, jnp.maximum(ids, 0)[..., None], axis=2).astype(k_post.dtype)
    return Landmarks(landmarks, ids, outlier_ids)


def read_prompt(
    policy: ShadowKV,
    k_pre: Float[Array, "B K T D"],
    k_post: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    q_last: Float[Array, "B N D"],
    lengths: Int32[Array, " B"],
    sizes: Sizes,
) -> Prompted:
    """What prompts leave behind, whose attention is dense; see `Policy.read_prompt`.

    What the last query selects counts as selected before the first step.
    """
    units = policy.num_units(sizes)
    landmarks = find_landmarks(policy, k_post, lengths, units)
    later = later_positions(policy, lengths, _prompt_room(policy) + sizes.new)
    outliers = common.unit_tokens(landmarks.outlier_ids, policy.chunk)
    outliers = jnp.pad(outliers, ((0, 0), (0, 0), (0, later.shape[1] - outliers.shape[2])), constant_values=-1)
    # Behind the end of the prompt lies anything, until tokens are generated.
    positions = jnp.where(outliers >= 0, outliers, later[:, None])
    exact = jnp.stack([common.take_tokens(x, positions) for x in (k_post, v)], axis=2)
    scores = score(policy, landmarks, q_last, lengths)
    ids, order = select(policy, landmarks, scores, lengths)
    ids = jnp.take_along_axis(ids, order, axis=-1)
    left, right = factor_keys(policy, k_pre, lengths)
    left = chunks_of(policy, left[:, None], units)[:, 0]
    last_used = jnp.where(ids >= 0, lengths[:, None, None] - 1, -1)
    kept = ShadowKVState(lengths, left, right, landmarks, exact, ids, last_used)
    return Prompted(kept, chunks_of(policy, v, units)[:, :, :, None], num_chunks(policy, lengths), ids, ids)


def _prompt_room(policy: ShadowKV) -> int:
    """Exact tokens of a prompt: of the local part and the outliers."""
    # A row has at most one chunk less a token more than its local chunks; a whole one keeps widths even.
    return (policy.local_chunks + 1 + policy.outlier_chunks) * policy.chunk


def num_skipped(policy: ShadowKV, prompt_lengths: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Tokens that are not exact: behind the outliers, the token at position p lies at place p less these."""
    return num_landmarks(policy, prompt_lengths) * policy.chunk


def later_positions(policy: ShadowKV, prompt_lengths: Int32[Array, " B"], room: int) -> Int32[Array, "B E"]:
    """Which token lies at every place of the exact ones behind the outliers, as if generation went on until the room is
    full; -1 where outliers lie."""
    tokens = num_skipped(policy, prompt_lengths)[:, None] + jnp.arange(room, dtype=jnp.int32)
    is_later = tokens >= num_chunks(policy, prompt_lengths)[:, None] * policy.chunk
    return jnp.where(is_later, tokens, -1)


def attended_positions(
    policy: ShadowKV,
    prompt_lengths: Int32[Array, " B"],
    outlier_ids: Int32[Array, "B K o"],
    ids: Int32[Array, "B K s"],
    positions: Int32[Array, " B"],
    room: int,
) -> Int32[Array, "B K _"]:
    """Tokens attended to by that at `positions`, in the original's order, -1 for none at any place: local ones,
    outliers, those of selected chunks, generated ones."""
    later = later_positions(policy, prompt_lengths, room)
    local = jnp.where(later < prompt_lengths[:, None], later, -1)[:, : _prompt_room(policy)]
    generated = jnp.where((later >= prompt_lengths[:, None]) & (later <= positions[:, None]), later, -1)
    by_head = lambda x: jnp.broadcast_to(x[:, None], (*outlier_ids.shape[:2], x.shape[1]))
    outliers, chosen = (common.unit_tokens(x, policy.chunk) for x in (outlier_ids, ids))
    return jnp.concatenate([by_head(local), outliers, chosen, by_head(generated)], axis=2)


def score(
    policy: ShadowKV, landmarks: Landmarks, q: Float[Array, "B N D"], prompt_lengths: Int32[Array, " B"]
) -> Float[Array, "B K M"]:
    """float32: the largest share that a query head of the KV head gives to a landmark; 0 where there is none."""
    batch, heads, room, dim = landmarks.keys.shape
    logits = dot("bkgd,bkld->bkgl", q.reshape(batch, heads, -1, dim), landmarks.keys)
    exists = jnp.arange(room, dtype=jnp.int32) < num_landmarks(policy, prompt_lengths)[:, None, None, None]
    return common.softmax(logits / jnp.sqrt(jnp.float32(_SCORE_DIM)), exists).max(2)


def select(
    policy: ShadowKV, landmarks: Landmarks, scores: Float[Array, "B K M"], lengths: Int32[Array, " B"]
) -> tuple[Int32[Array, "B K s"], Int32[Array, "B K s"]]:
    """(the chunks of the best landmarks, their order by score). Chunks are ascending, -1 where there are no more; ties
    go to the lower one. The order is of places in that list, best first. lengths: of prompts, 0 to select nothing."""
    # Landmarks come first in their lists.
    places = select_blocks(
        scores[:, :, None], None, num_landmarks(policy, lengths)[:, None] - 1, block_size=1,
        num_selected_blocks=policy.num_selected, num_sink_blocks=0, num_local_blocks=0, num_query_blocks=0,
    )[:, :, 0]  # fmt: skip
    at_places = lambda x, none: jnp.where(places >= 0, jnp.take_along_axis(x, jnp.maximum(places, 0), axis=-1), none)
    order = jnp.argsort(at_places(scores, -jnp.inf), axis=-1, stable=True, descending=True)
    return at_places(landmarks.ids, -1), order.astype(jnp.int32)


def decode(
    policy: ShadowKV,
    state: ShadowKVState,
    store: Store,
    rotations: Rotations,
    token: tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"]],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> Stepped:
    """One layer of a token per row; see `Policy.decode`. state, store: of all layers."""
    q, k, v = token
    lengths, landmarks = common.at_layer((state.prompt_lengths, state.landmarks), layer)
    places = jnp.where(positions >= 0, positions - num_skipped(policy, lengths), -1)
    exact = common.put_token(state.exact, jnp.stack([k, v], axis=2), places, layer)

    scores = score(policy, landmarks, q, lengths)
    ids, order = select(policy, landmarks, scores, jnp.where(positions >= 0, lengths, 0))
    held, last_used, slots, loads, fetched = resolve_slots(state.held, state.last_used, ids, positions, layer)
    pool = store.pool
    if store.host is None:
        slots, fetched = ids, jnp.zeros_like(fetched)
    else:
        pool = fetch_blocks(pool, store.host, store.page_table, loads, slots, layer, transport=store.transport)

    factors = Factors(state.token_factors, state.head_factors, *rotations)
    out = rebuilt_attention(q, factors, Chunks(pool, ids, slots), Exact(exact, places + 1), layer)
    kept = dataclasses.replace(state, exact=exact, held=held, last_used=last_used)
    # As the original has them, best first.
    ids, loads = (jnp.take_along_axis(x, order, axis=-1) for x in (ids, loads))
    new_ids = common.compact(loads, loads >= 0)
    attended = attended_positions(policy, lengths, landmarks.outlier_ids, ids, positions, exact.shape[4])
    return Stepped(kept, pool, out, ids, new_ids, fetched, scores, attended)
