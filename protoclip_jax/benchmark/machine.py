"""What machine the numbers come from."""

import collections
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.extend import backend

from protoclip_jax import versions

_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total",
    "--format=csv,noheader",
)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, memory, devices, versions, and how busy the machine is now."""
    devices = jax.devices()
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def devices() -> dict[str, Any]:
    """What computes here, and with which versions; None for what cannot be told."""
    found = jax.local_devices()
    kinds = collections.Counter(device.device_kind for device in found)
    stats = found[0].memory_stats() or {}
    return {
        "kinds": dict(kinds),
        "device_gb": stats["bytes_limit"] / 1e9 if "bytes_limit" in stats else None,
        "driver": driver(),
        # Names the CUDA or libtpu that JAX found, beyond what the packages' versions say.
        "runtime": " ".join(backend.get_backend().platform_version.split()),
        "versions": versions.versions() | {"python": platform.python_version()},
        "commit": versions.commit(),
    }


def driver() -> list[str] | None:
    """Name, driver and memory of each GPU as nvidia-smi tells them, or the driver's own line."""
    if shutil.which(_NVIDIA_SMI[0]):
        try:
            told = subprocess.run(
                _NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=20
            )
            return told.stdout.strip().splitlines()
        except (OSError, subprocess.SubprocessError):
            pass  # as in a container that holds the program without its library
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[:1]
    except OSError:
        return None


def line(found: dict[str, Any]) -> str:
    """The description in a line."""
    memory = f", {found['memory_gb']} GB" if found["memory_gb"] else ""
    load = f"; load {found['load']}" if found["load"] is not None else ""
    return (
        f"{found['cpu']}, {found['cores']} cores{memory}; {found['devices']} x {found['device']}; "
        f"jax {found['jax']}, Python {found['python']}{load}"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    except (ValueError, OSError, AttributeError):
        return None
