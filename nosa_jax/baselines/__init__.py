"""Rival policies of offloaded decoding: ShadowKV, ArkVale and InfLLM as functions over the arrays of one layer.

    import numpy as np
    from nosa_jax import baselines

    policy = baselines.ArkVale(page=8, budget=12, page_topks=9, sink=2, window=3)
    draw = np.random.default_rng(0).standard_normal
    case = {"k_post": draw((2, 150, 16)), "v": draw((2, 150, 16)), "q_last_post": draw((4, 16))}
    case |= {"dec_q_post": draw((20, 4, 16)), "dec_k_post": draw((20, 2, 16)), "dec_v": draw((20, 2, 16))}
    trace = baselines.replay(policy, {name: array.astype(np.float32) for name, array in case.items()})
    print("pages fetched per step:", (trace.new_ids >= 0).sum(-1).mean())

With `CacheConfig(policy=policy)` a `full` model decodes by ShadowKV or ArkVale, by the same functions, which
`nosa_jax.policy` names; InfLLM runs here alone. A policy is a frozen dataclass; each module says what its policy does,
step by step, and where the original's code differs from itself. All are checked against numbers that the original code
gave.
"""

from nosa_jax.baselines.arkvale import ArkVale
from nosa_jax.baselines.infllm import InfLLM
from nosa_jax.baselines.replay import Trace, replay
from nosa_jax.baselines.shadowkv import ShadowKV

__all__ = ["ArkVale", "InfLLM", "ShadowKV", "Trace", "replay"]
