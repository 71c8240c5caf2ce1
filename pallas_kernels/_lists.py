"""Lists of integers in memory, through which the threads of one program of a Triton kernel tell each other what they
found."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import _backend


class List(NamedTuple):
    """The last axis of `ref` at `here`. What others stored is seen behind a barrier."""

    ref: Any
    here: tuple[Any, ...]

    def _at(self, index, mask):
        mask &= (index >= 0) & (index < self.ref.shape[-1])
        # Lanes that touch nothing still get an address of their own.
        spare = self.ref.shape[-1] + jnp.arange(index.size, dtype=jnp.int32)
        return self.ref.at[(*self.here, jnp.where(mask, index, spare))], mask

    def store(self, index, value, mask=True):
        where, mask = self._at(index, mask)
        _backend.store(where, jnp.broadcast_to(jnp.asarray(value, self.ref.dtype), index.shape), mask=mask)

    def load(self, index, mask=True):
        where, mask = self._at(index, mask)
        return _backend.load(where, mask=mask, other=-1)

    def lanes(self):
        return jnp.arange(_backend.next_power_of_two(self.ref.shape[-1]), dtype=jnp.int32)
