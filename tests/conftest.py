"""Eight host devices, checked shapes and one cache of compiled programs for every test."""

import os
import sys
from pathlib import Path

# Before the first import of jax: the device count is fixed when its backend starts.
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

# Compiling is most of the tests' time: they run programs as they are, but for the core tests on the
# newest versions (`launch/test.sh --core`), whose programs are optimised as those of users. Child
# processes inherit it, so that their bits are those of this process.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if "core" in sys.argv else "1")

# Tests compile the same programs again and again, in several processes: all find them here.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from absl import flags as absl_flags
from jaxtyping import install_import_hook

install_import_hook("protoclip_jax", "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def _full_products():
    """An accelerator would round the factors of float32 products; tolerances are float32's."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_module():
    """Frees the memory of a module's programs: all of them together take gigabytes."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    # grain's workers read absl flags, which pytest never parses.
    absl_flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    kept = [item for item in items if "slow" not in item.keywords]
    left = [item for item in items if "slow" in item.keywords]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
