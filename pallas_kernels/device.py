"""Which device is computed for: the one place that asks."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """platform: "cpu", "gpu" or "tpu". kind: the model, "NVIDIA H200" for example."""

    platform: str
    kind: str

    @property
    def is_gpu(self) -> bool:
        return self.platform == "gpu"


def current_device() -> Device:
    """The device that is compiled for: that of an abstract mesh, else `jax_default_device`, else JAX's first."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    chosen = jax.config.jax_default_device
    device = chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]
    return Device(device.platform, device.device_kind)
