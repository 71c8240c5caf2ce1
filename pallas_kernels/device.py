"""Which device is computed for: the one place that asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax


class Device(NamedTuple):
    """platform: "cpu", "gpu" or "tpu". kind: the model, "NVIDIA H200" for example."""

    platform: str
    kind: str

    @property
    def is_gpu(self) -> bool:
        return self.platform == "gpu"


class Rates(NamedTuple):
    """Bytes per second. memory: within the device's memory. link: from pinned host memory to the device."""

    memory: float
    link: float


# By kind of device, as measured on single cards of a host with PCIe 5 x16: copies of arrays of gigabytes within device
# memory, reads and writes counted, and `device_put` of 1 GiB from pinned memory (53 to 55 GB/s, the lower figure kept).
RATES: Mapping[str, Rates] = {
    "NVIDIA H100 80GB HBM3": Rates(3.0e12, 55e9),
    "NVIDIA H200": Rates(4.3e12, 53e9),
}


def current_device() -> Device:
    """The device that is compiled for: that of an abstract mesh, else `jax_default_device`, else JAX's first."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind)
    device = default_device()
    return Device(device.platform, device.device_kind)


def default_device() -> jax.Device:
    """Where JAX puts what is given no other place: `jax_default_device`, else its first device of this process."""
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
