"""What machine the numbers come from."""

import os
import platform
from pathlib import Path
from typing import Any

import jax


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
