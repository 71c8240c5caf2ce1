"""ShadowKV (arXiv 2410.21465; ByteDance-Seed/ShadowKV at e51904c, its accuracy class), one layer.

Values live in host memory. Keys are kept as a product of rank r of the keys before RoPE, and rebuilt on the device.

1. A prompt leaves behind (`read_prompt`): factors of its keys; its last `local_chunks` chunks and the rest of a chunk,
   exact; of the chunks before them the `outlier_chunks` whose keys agree least with their mean, exact; of all others
   the mean key after RoPE, the landmark.
2. A token is appended (`append`): exact, and never dropped, chunked or selected.
3. Queries score landmarks (`score`): softmax over the landmarks per query head, then the largest of the heads of a KV
   head. `select` takes the best; what of them was not selected in the step before must be fetched, values alone.
4. Attended are the local tokens, outliers, selected chunks and generated tokens (`attended_tokens`), with the keys of
   selected chunks rebuilt at every step (`rebuild_keys`).

Where the original disagrees with itself, this follows the class that its accuracy was measured with. So scores are
scaled by sqrt(128), whatever the head dim is (attention by sqrt(D)), and a chunk's keys are rebuilt also when it was
selected before (its fast class keeps the exact keys of the first selection for as long as a chunk stays). Unlike it:
any number of rows, each of its own length, a short one too; scores stay float32 (the original rounds them to the
model's dtype, in which many tie); and the factors come from the Gram matrix of the keys by `eigh`, not from an SVD of
the keys: the product is the same, its parts are X V and V^T where the SVD has U and S V^T.

Shapes: B rows, T prompt tokens, K KV heads, N query heads, D head dim, r rank, s selected and o outlier chunks, L room
for landmarks, E for exact tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax._pytree import pytree_dataclass
from nosa_jax.baselines import common
from nosa_jax.baselines.common import Rotations
from pallas_kernels.checks import bad_value, require_size

_SCORE_DIM = 128  # by the root of which the original divides at any head dim


@dataclasses.dataclass(frozen=True)
class ShadowKV:
    """Which tokens ShadowKV attends to (arXiv 2410.21465); the defaults are those of the NOSA paper's comparison.

    chunk: tokens per chunk, 8 or 64 there.
    rank: of the factors of a layer's keys before RoPE, all KV heads together; at most K * D.
    budget: tokens in selected chunks, a multiple of `chunk`. local_chunks: exact chunks at the end of the prompt.
    outlier_chunks: exact chunks where a landmark would say least. Attended are budget + (local_chunks + outlier_chunks)
        * chunk tokens, the rest of the prompt's last chunk, and all that is generated.

    Raises TypeError or ValueError where a value makes no sense.
    """

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


@pytree_dataclass
class Landmarks:
    """How the chunks of a prompt before its local ones are looked for; see `find_landmarks`.

    keys [B, K, L, D], ids [B, K, L]: mean keys and their chunks, ascending, -1 for no more. outlier_ids [B, K, o]: by
    agreement, least first, -1 for no more. agreement float32 [B, K, L + o]: of every chunk, the smallest cosine between
    its mean key and one of its keys; inf where there is no such chunk.
    """

    keys: Any
    ids: Any
    outlier_ids: Any
    agreement: Any


@pytree_dataclass
class ShadowKVState:
    """What one layer remembers while it decodes.

    prompt_lengths [B]. token_factors [B, T, r], head_factors [B, K, r, D]: keys before RoPE are their product.
    values [B, K, T, D]: of the prompt; in an engine they are in host memory.
    exact_keys, exact_values [B, K, E, D], exact_positions [B, K, E]: local tokens, outliers, generated tokens, each
    with room for the most that any row may have; -1 where nothing lies.
    selected [B, K, s]: chunks whose values the step before had on the device.
    """

    prompt_lengths: Any
    token_factors: Any
    head_factors: Any
    landmarks: Landmarks
    values: Any
    exact_keys: Any
    exact_values: Any
    exact_positions: Any
    selected: Any


@pytree_dataclass
class ShadowKVStep:
    """What a step did: ids [B, K, s] of the selected chunks by score; new_ids [B, K, s] those of them whose values
    crossed the link, in that order, -1 behind; scores [B, K, L] of the landmarks; attended [B, K, A] positions in
    the order of attention, -1 where nothing is; out [B, N, D]."""

    ids: Any
    new_ids: Any
    scores: Any
    attended: Any
    out: Any


def num_chunks(policy: ShadowKV, lengths: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Chunks of a prompt before its local part, outliers among them."""
    return jnp.maximum(lengths // policy.chunk - policy.local_chunks, 0)


def factor_keys(
    policy: ShadowKV, k_pre: Float[Array, "B K T D"], lengths: Int32[Array, " B"]
) -> tuple[Float[Array, "B T r"], Float[Array, "B K r D"]]:
    """Factors of the keys before RoPE, whose product is the closest of rank r: [T, r] times [r, D] of each head.

    Keys of all heads lie side by side, X [T, K * D]. The best r directions are eigenvectors V of X^T X, which has no
    side as long as the text; the factors are X V and V^T.
    """
    batch, heads, tokens, dim = k_pre.shape
    keys = jnp.moveaxis(k_pre, 1, 2).reshape(batch, tokens, heads * dim).astype(jnp.float32)
    keys = jnp.where((jnp.arange(tokens) < lengths[:, None])[..., None], keys, 0)
    gram = jnp.einsum("btx,bty->bxy", keys, keys, precision="highest")
    _, vectors = jnp.linalg.eigh(gram)  # ascending
    vectors = vectors[..., : -policy.rank - 1 : -1]
    left = jnp.einsum("btx,bxr->btr", keys, vectors, precision="highest")
    right = jnp.moveaxis(vectors.reshape(batch, heads, dim, policy.rank), 2, 3)
    return left.astype(k_pre.dtype), right.astype(k_pre.dtype)


def find_landmarks(policy: ShadowKV, k_post: Float[Array, "B K T D"], lengths: Int32[Array, " B"]) -> Landmarks:
    """Outliers and landmarks of the chunks before the local part, from keys after RoPE."""
    batch, heads, tokens, dim = k_post.shape
    size, outliers = policy.chunk, policy.outlier_chunks
    # Room for all outliers and one selection even where the text is short, so that no width depends on it.
    room = max(tokens // size - policy.local_chunks, outliers + policy.num_selected)
    keys = jnp.pad(k_post, ((0, 0), (0, 0), (0, max(0, room * size - tokens)), (0, 0)))[:, :, : room * size]
    keys = keys.reshape(batch, heads, room, size, dim).astype(jnp.float32)
    exists = jnp.arange(room, dtype=jnp.int32) < num_chunks(policy, lengths)[:, None, None]
    keys = jnp.where(exists[..., None, None], keys, 0)
    means = keys.mean(3)
    norm = lambda x: jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8)
    dots = jnp.einsum("bkcd,bkcsd->bkcs", means, keys, precision="highest")
    agreement = (dots / (norm(means)[..., None] * norm(keys))).min(-1)
    exists = jnp.broadcast_to(exists, agreement.shape)
    outlier_ids = common.best(-agreement, exists, outliers)
    ids = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), exists.shape)
    ids = common.compact(ids, exists & ~common.among(ids, outlier_ids))[..., : room - outliers]
    landmarks = jnp.take_along_axis(means, jnp.maximum(ids, 0)[..., None], axis=2).astype(k_post.dtype)
    return Landmarks(landmarks, ids, outlier_ids, jnp.where(exists, agreement, jnp.inf))


def read_prompt(
    policy: ShadowKV,
    k_pre: Float[Array, "B K T D"],
    k_post: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    q_last: Float[Array, "B N D"],
    lengths: Int32[Array, " B"],
    max_new: int,
) -> ShadowKVState:
    """What prompts leave behind, whose attention is dense.

    k_pre, k_post: keys before and after RoPE; what lies behind a row's length counts for nothing. q_last: after RoPE,
    of each row's last token: what it selects counts as selected before the first step. max_new: room for generated
    tokens.
    """
    batch, heads = k_post.shape[:2]
    landmarks = find_landmarks(policy, k_post, lengths)
    first = num_chunks(policy, lengths) * policy.chunk
    # A row has at most one chunk less a token more than its local chunks.
    local = first[:, None] + jnp.arange((policy.local_chunks + 1) * policy.chunk - 1, dtype=jnp.int32)
    local = jnp.where(local < lengths[:, None], local, -1)
    local = jnp.broadcast_to(local[:, None], (batch, heads, local.shape[-1]))
    positions = jnp.concatenate([local, common.unit_tokens(landmarks.outlier_ids, policy.chunk)], -1)
    wider = lambda x: jnp.pad(common.take_tokens(x, positions), ((0, 0), (0, 0), (0, max_new), (0, 0)))
    scores = score(landmarks, q_last)
    return ShadowKVState(
        lengths,
        *factor_keys(policy, k_pre, lengths),
        landmarks,
        v,
        wider(k_post),
        wider(v),
        jnp.pad(positions, ((0, 0), (0, 0), (0, max_new)), constant_values=-1),
        select(policy, landmarks, scores),
    )


def append(
    policy: ShadowKV,
    state: ShadowKVState,
    k_post: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    positions: Int32[Array, " B"],
) -> ShadowKVState:
    """A generated token per row, kept exact; one beyond the room is dropped."""
    places = _prompt_room(policy) + positions - state.prompt_lengths
    put = lambda store, token: common.put_tokens(store, token[:, :, None], places[:, None])
    at = state.exact_positions.at[common.rows_of(places), :, places].set(positions[:, None], mode="drop")
    return dataclasses.replace(
        state, exact_keys=put(state.exact_keys, k_post), exact_values=put(state.exact_values, v), exact_positions=at
    )


def _prompt_room(policy: ShadowKV) -> int:
    """Exact tokens of a prompt: of the local part and the outliers."""
    return (policy.local_chunks + 1 + policy.outlier_chunks) * policy.chunk - 1


def score(landmarks: Landmarks, q: Float[Array, "B N D"]) -> Float[Array, "B K L"]:
    """float32: the largest share that a query head of the KV head gives to a landmark; 0 where there is none."""
    batch, heads, _, dim = landmarks.keys.shape
    q = q.reshape(batch, heads, -1, dim).astype(jnp.float32)
    logits = jnp.einsum("bkgd,bkld->bkgl", q, landmarks.keys.astype(jnp.float32), precision="highest")
    return common.softmax(logits / jnp.sqrt(jnp.float32(_SCORE_DIM)), (landmarks.ids >= 0)[:, :, None]).max(2)


def select(policy: ShadowKV, landmarks: Landmarks, scores: Float[Array, "B K L"]) -> Int32[Array, "B K s"]:
    """The chunks of the best landmarks, best first, ties to the lower chunk; -1 where there are no more."""
    places = common.best(scores, landmarks.ids >= 0, policy.num_selected)
    return jnp.where(places >= 0, jnp.take_along_axis(landmarks.ids, jnp.maximum(places, 0), axis=-1), -1)


def rebuild_keys(
    token_factors: Float[Array, "B T r"],
    head_factors: Float[Array, "B K r D"],
    positions: Int32[Array, "B K A"],
    rotations: Rotations,
) -> Float[Array, "B K A D"]:
    """Keys after RoPE of tokens of the prompt, float32, from their factors; those of token 0 for -1."""
    factors = common.take_tokens(token_factors[:, None], positions.reshape(positions.shape[0], 1, -1))
    factors = factors.reshape(*positions.shape, -1).astype(jnp.float32)
    keys = jnp.einsum("bkar,bkrd->bkad", factors, head_factors.astype(jnp.float32), precision="highest")
    return rotations.turn(keys, positions)


def attended_tokens(policy: ShadowKV, state: ShadowKVState, ids: Int32[Array, "B K s"]) -> Int32[Array, "B K A"]:
    """Positions in the order of attention: local tokens, outliers, selected chunks, generated tokens."""
    return _between(policy, state.exact_positions, common.unit_tokens(ids, policy.chunk))


def _between(policy: ShadowKV, exact: Array, selected: Array) -> Array:
    """What belongs to selected tokens, put between the prompt's exact tokens and the generated ones."""
    room = _prompt_room(policy)
    return jnp.concatenate([exact[:, :, :room], selected.astype(exact.dtype), exact[:, :, room:]], axis=2)


def decode(
    policy: ShadowKV,
    state: ShadowKVState,
    rotations: Rotations,
    positions: Int32[Array, " B"],
    q: Float[Array, "B N D"],
    k_post: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
) -> tuple[ShadowKVState, ShadowKVStep]:
    """One token per row at `positions`, its query and key after RoPE; it sees itself."""
    state = append(policy, state, k_post, v, positions)
    scores = score(state.landmarks, q)
    ids = select(policy, state.landmarks, scores)
    new_ids = common.compact(ids, (ids >= 0) & ~common.among(ids, state.selected))
    chosen = common.unit_tokens(ids, policy.chunk)
    rebuilt = rebuild_keys(state.token_factors, state.head_factors, chosen, rotations)
    keys = _between(policy, state.exact_keys, rebuilt)
    values = _between(policy, state.exact_values, common.take_tokens(state.values, chosen))
    attended = attended_tokens(policy, state, ids)
    out = common.attend(q, keys, values, attended >= 0)
    return dataclasses.replace(state, selected=ids), ShadowKVStep(ids, new_ids, scores, attended, out)
