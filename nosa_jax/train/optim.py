"""AdamW with a warmup-stable-decay schedule, global-norm clipping, and weight decay on matrices alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.checks import bad_value, require_int, require_number


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

    Raises TypeError or ValueError when a field is out of range.
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

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("final_learning_rate", 0.0, 1.0),
            ("warmup_fraction", 0.0, 1.0),
            ("decay_fraction", 0.0, 1.0),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("epsilon", 1e-16, 1.0),
            ("weight_decay", 0.0, 100.0),
            ("clip_norm", 1e-6, 1e6),
        ):
            number = require_number(f"OptimizerConfig.{name}", getattr(self, name), low, high)
            object.__setattr__(self, name, number)
        if self.warmup_fraction + self.decay_fraction > 1:
            raise bad_value(
                "OptimizerConfig.decay_fraction",
                "must satisfy warmup_fraction + decay_fraction <= 1",
                f"{self.warmup_fraction} + {self.decay_fraction}",
                f"Use at most {1 - self.warmup_fraction:.3g}.",
            )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The learning rate of step 0 .. steps - 1 (float32): rises, stays, falls.

    Step 0 already moves; past the last step the rate stays at `final_learning_rate`.
    """
    require_int("steps", steps, 1)
    warmup = max(round(config.warmup_fraction * steps), 1)
    decay = max(round(config.decay_fraction * steps), 1)

    def learning_rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / warmup, 1.0)
        falling = jnp.clip((steps - step) / decay, 0.0, 1.0)
        return rising * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * falling)

    return learning_rate


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases and the importance vector `A`.

    path: key path of the parameter in the model. The name tells: layers and heads add axes to norms, too.
    """
    names = [key.name if isinstance(key, jax.tree_util.GetAttrKey) else getattr(key, "key", None) for key in path]
    name = str([name for name in names if name != "value"][-1])
    return not (name == "A" or name.endswith(("norm", "bias")))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, weight decay, schedule, as one optax transformation for a run of `steps` steps.

    Its state does not depend on `steps`.
    """

    def add_decay(updates: Any, params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, update, param: update + config.weight_decay * param if decays(path) else update,
            updates,
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.stateless(add_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
