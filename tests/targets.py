"""Devices that nobody has to own: what is traced inside `jax.sharding.use_abstract_mesh(target(kind))` is for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import _backend


def target(kind: str) -> AbstractMesh:
    """A mesh of one GPU of this kind."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)


H200 = target("NVIDIA H200")


@contextlib.contextmanager
def cudnn_installed(version: int | None = 91000) -> Iterator[None]:
    """Inside, JAX takes cuDNN for installed, which is all that lowering asks for; or for missing, with None."""

    def check() -> int:
        if version is None:
            raise RuntimeError("cuDNN is not detected.")
        return version

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention_stablehlo, "check_cudnn_version", check)
        _backend._cudnn_missing.cache_clear()
        yield
    _backend._cudnn_missing.cache_clear()
