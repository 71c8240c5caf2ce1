"""AdamW with its schedule, clipping and weight decay, each by patterns over the parameters' names where wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from nosa_jax._pytree import by_name, name_of
from nosa_jax.train.patterns import Rules, as_rules, first_match, require_matches
from pallas_kernels.checks import bad_type, bad_value, require_int, require_number, require_one_of

Schedule = Literal["wsd", "cosine", "constant"]
UNUSED = {"cosine": ("decay_fraction",), "constant": ("decay_fraction", "final_learning_rate")}
"""The fields of OptimizerConfig that a schedule has no use for."""

MomentDtype = Literal["float32", "bfloat16"]

# A moment moves by 1 - beta of what it lacks. Where that is below half a step of bfloat16 (2**-9) it stands still; at
# this beta the second moment is at most a tenth off.
_BFLOAT16_BETA = 0.98

_BELOW_ONE = 1 - 1e-7  # a moment that forgets nothing is never a mean


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    learning_rate: the rate of the stable phase.
    final_learning_rate: the rate reached when the last step is done.
    warmup_fraction, decay_fraction: shares of all steps spent rising to and falling from `learning_rate`, linearly.
        Continued pretraining as published is a small step down: e.g. 3e-4 and 2e-4 with `decay_fraction=1.0`.
    beta1, beta2, epsilon: Adam's decay of the two moments, and its term against division by zero.
    weight_decay: pulls matrices towards 0 by this times the learning rate; see `decays`.
    clip_norm: gradients with a larger global norm are scaled down to it.
    schedule: `wsd` (warmup, stable, decay), `cosine` (after the warmup half a cosine down to `final_learning_rate`; no
        `decay_fraction`) or `constant` (after the warmup; no `final_learning_rate` either).
    moment_dtype: in which Adam's two moments are kept between steps. They are computed in float32; `bfloat16` halves
        their memory, and needs both betas at 0.98 or below.
    learning_rate_multipliers: pairs of a glob pattern over parameters' names and a factor of the learning rate. There
        are none unless given. A small and slow part learns with more, e.g. `(("*importance*", 50.0),)` where everything
        trains.
    weight_decays: pairs of a pattern and the weight decay of what it matches, instead of `weight_decay`, norms and `A`
        included. Biases never decay; `make_optimizer` refuses a pattern of a decay for them alone.
    clip_norms: pairs of a pattern and the norm that the gradients of what it matches are scaled down to, apart from all
        others, which `clip_norm` is for.

    In pairs the first pattern that matches a name counts. Raises TypeError or ValueError when a field is out of range,
    and for one other than its default that `schedule` has no use for.
    """

    learning_rate: float = 3e-3
    final_learning_rate: float = 0.0
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Schedule = "wsd"
    moment_dtype: MomentDtype = "float32"
    learning_rate_multipliers: Rules = ()
    weight_decays: Rules = ()
    clip_norms: Rules = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("final_learning_rate", 0.0, 1.0),
            ("warmup_fraction", 0.0, 1.0),
            ("decay_fraction", 0.0, 1.0),
            ("beta1", 0.0, _BELOW_ONE),
            ("beta2", 0.0, _BELOW_ONE),
            ("epsilon", 1e-16, 1.0),
            ("weight_decay", 0.0, 100.0),
            ("clip_norm", 1e-6, 1e6),
        ):
            number = require_number(f"OptimizerConfig.{name}", getattr(self, name), low, high)
            object.__setattr__(self, name, number)
        for name, low, high in (
            ("learning_rate_multipliers", 0.0, 1e6),
            ("weight_decays", 0.0, 100.0),
            ("clip_norms", 1e-6, 1e6),
        ):
            object.__setattr__(self, name, as_rules(f"OptimizerConfig.{name}", getattr(self, name), low, high))
        require_one_of("OptimizerConfig.schedule", self.schedule, get_args(Schedule))
        require_one_of("OptimizerConfig.moment_dtype", self.moment_dtype, get_args(MomentDtype))
        for name in UNUSED.get(self.schedule, ()):
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default:
                rule = f"must stay {default} where the schedule is {self.schedule!r}, which has no use for it"
                raise bad_value(
                    f"OptimizerConfig.{name}", rule, value, f"Leave it at {default}, or take schedule='wsd'."
                )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise bad_value(
                "OptimizerConfig.decay_fraction",
                "must satisfy warmup_fraction + decay_fraction <= 1",
                f"{self.warmup_fraction} + {self.decay_fraction}",
                f"Use at most {1 - self.warmup_fraction:.3g}.",
            )
        if self.moment_dtype == "bfloat16" and max(self.beta1, self.beta2) > _BFLOAT16_BETA:
            raise bad_value(
                "OptimizerConfig.moment_dtype",
                f"must be float32 where beta1 or beta2 is above {_BFLOAT16_BETA}, as bfloat16 loses what a step adds",
                f"bfloat16 with {self.beta1} and {self.beta2}",
                "Lower the betas or keep float32.",
            )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The learning rate of step 0 .. steps - 1 (float32): rises, and then stays or falls.

    Step 0 already moves; past the last step the rate stays at the final one.
    """
    require_int("steps", steps, 1)
    warmup = max(round(config.warmup_fraction * steps), 1)
    decay = max(round(config.decay_fraction * steps), 1)
    final = config.final_learning_rate

    def learning_rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / warmup, 1.0)
        if config.schedule == "constant":
            return rising * config.learning_rate
        if config.schedule == "cosine":
            done = jnp.clip((step + 1 - warmup) / (steps + 1 - warmup), 0.0, 1.0)
            falling = 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            falling = jnp.clip((steps - step) / decay, 0.0, 1.0)
        return rising * (final + (config.learning_rate - final) * falling)

    return learning_rate


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases and the importance vector `A`.

    path: key path of the parameter in the model. The name tells: layers and heads add axes to norms, too.
    """
    name = name_of(path).rpartition(".")[2]
    return not (name == "A" or name.endswith(("norm", "bias")))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, weight decay, schedule, as one optax transformation for a run of `steps` steps.

    It is for the model, or for the part of it that trains: names are those of the tree that it is initialised with.
    Moments have the structure of that tree. The state does not depend on `steps`. Its `init` raises ValueError for a
    pattern that matches nothing, and for a weight decay of biases alone.
    """
    return optax.chain(
        _clip(config),
        _scale_by_adam(config),
        _decay_and_multiply(config),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )


def as_optimizer(value: Any, steps: int) -> optax.GradientTransformation:
    """The optax transformation of an OptimizerConfig for a run of `steps` steps; any other one is returned as it is.

    Raises TypeError for anything else.
    """
    if isinstance(value, OptimizerConfig):
        return make_optimizer(value, steps)
    if not isinstance(value, optax.GradientTransformation):
        rule = "must be an OptimizerConfig or an optax.GradientTransformation"
        got = f"{type(value).__name__} {value!r:.60}"
        raise bad_type("optimizer", rule, got, "Pass optax.adam(1e-3), for example.")
    return value


# Parts of the chain. They are functions of names rather than `optax.partition`: states keep the parameters' structure,
# and a checkpoint its names, whatever patterns there are.


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
    if not config.clip_norms:
        return optax.clip_by_global_norm(config.clip_norm)
    limits = [config.clip_norm, *(limit for _, limit in config.clip_norms)]
    groups = [(pattern, number) for number, (pattern, _) in enumerate(config.clip_norms, start=1)]

    def update(updates: Any, params: Any) -> Any:
        del params
        group = lambda path: first_match(groups, name_of(path), 0)
        squares = [jnp.zeros((), jnp.float32)] * len(limits)
        for path, leaf in jax.tree.leaves_with_path(updates):
            squares[group(path)] += jnp.sum(jnp.square(leaf), dtype=jnp.float32)
        scales = [limit / jnp.maximum(jnp.sqrt(square), limit) for limit, square in zip(limits, squares, strict=True)]
        return jax.tree.map_with_path(lambda path, leaf: leaf * scales[group(path)], updates)

    return _by_names("OptimizerConfig.clip_norms", config.clip_norms, optax.stateless(update))


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.moment_dtype == "float32":
        return adam
    kept = lambda state, dtype: state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, config.moment_dtype)

    return optax.GradientTransformation(lambda params: kept(adam.init(params), config.moment_dtype), update)


def _decay_and_multiply(config: OptimizerConfig) -> optax.GradientTransformation:
    def change(path: Any, update: Any, param: Any) -> Any:
        name = name_of(path)
        decay = first_match(config.weight_decays, name, config.weight_decay if decays(path) else 0.0)
        if decay and not _is_bias(name):
            update = update + decay * param
        factor = first_match(config.learning_rate_multipliers, name, 1.0)
        return update if factor == 1 else factor * update

    transformation = _without_decay_of_biases(
        config, optax.stateless(lambda updates, params: jax.tree.map_with_path(change, updates, params))
    )
    for field in ("weight_decays", "learning_rate_multipliers"):
        transformation = _by_names(f"OptimizerConfig.{field}", getattr(config, field), transformation)
    return transformation


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _without_decay_of_biases(config: OptimizerConfig, transformation: Any) -> optax.GradientTransformation:
    """`transformation`, which refuses a weight decay that only biases match, as they never decay."""

    def init(params: Any) -> Any:
        names = by_name(params)
        for pattern, decay in config.weight_decays:
            if decay and all(_is_bias(name) for name in names if fnmatchcase(name, pattern)):
                rule = "must match something else than biases, which never decay"
                remedy = "Drop the pattern, or let it match other parameters."
                raise bad_value("OptimizerConfig.weight_decays", rule, repr(pattern), remedy)
        return transformation.init(params)

    return optax.GradientTransformation(init, transformation.update)


def _by_names(argument: str, rules: Rules, transformation: Any) -> optax.GradientTransformation:
    """`transformation`, which refuses a tree that a pattern of `rules` matches nothing of."""

    def init(params: Any) -> Any:
        require_matches(argument, [pattern for pattern, _ in rules], by_name(params))
        return transformation.init(params)

    return optax.GradientTransformation(init, transformation.update)
