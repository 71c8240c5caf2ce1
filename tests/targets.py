"""Devices that nobody has to own: what is traced inside `jax.sharding.use_abstract_mesh(target(kind))` is for them."""

from __future__ import annotations

from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def target(kind: str) -> AbstractMesh:
    """A mesh of one GPU of this kind."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)


H200 = target("NVIDIA H200")
