"""`--policy` and its settings, as the subcommands that decode take them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from nosa_jax import CacheConfig, baselines
from nosa_jax.config import Variant
from pallas_kernels.checks import bad_value

PolicyName = Literal["shadowkv", "arkvale"]
_POLICIES: dict[PolicyName, type[baselines.ShadowKV | baselines.ArkVale]] = {
    "shadowkv": baselines.ShadowKV,
    "arkvale": baselines.ArkVale,
}


def cache_of(offload: bool, slots: int | None, policy: PolicyName | None, settings: tuple[str, ...]) -> CacheConfig:
    """The cache that flags ask for. settings: of the policy, such as "budget=2048"; the rest is as its class has it."""
    if policy is None:
        if settings:
            raise bad_value("--policy-settings", "must go with --policy", " ".join(settings), "Name a policy, too.")
        return CacheConfig(offload=offload, slots=slots)
    given: dict[str, int] = {}
    known = [field.name for field in dataclasses.fields(_POLICIES[policy])]
    for setting in settings:
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in known:
            rule = f"must be settings of {policy}, which has {', '.join(known)}"
            raise bad_value("--policy-settings", rule, repr(setting), "Use one of these names.")
        if not value.removeprefix("-").isdecimal():
            raise bad_value("--policy-settings", "must be NAME=NUMBER", repr(setting), "Give a whole number.")
        if name in given:
            raise bad_value("--policy-settings", "must name a setting once", repr(setting), "Leave one of them out.")
        given[name] = int(value)
    return CacheConfig(offload=offload, slots=slots, policy=_POLICIES[policy](**given))


def require_whole_prompts(policy: PolicyName | None, chunk: int | None) -> None:
    """Raises ValueError where prompts are to be read in parts, which no policy does."""
    if policy is not None and chunk is not None:
        raise bad_value("--chunk", "must not go with --policy, which reads whole prompts", chunk, "Leave out one.")


def variant_of(variant: Variant | None, policy: PolicyName | None) -> Variant | None:
    """The variant that a model is loaded with: a policy takes the place of the attention of a full one.

    Raises ValueError for another one beside a policy.
    """
    if policy is not None and variant not in (None, "full"):
        raise bad_value("--variant", "must be full beside --policy", variant, "Leave out one of them.")
    return "full" if variant is None and policy is not None else variant
