import jax
import pytest
from jax.sharding import AxisType


@pytest.fixture(params=[(8, 1), (2, 4)], ids=["8x1", "2x4"])
def mesh(request):
    """Eight host devices as (data, fsdp)."""
    return jax.make_mesh(request.param, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
