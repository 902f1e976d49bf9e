"""`devices` of the check: what computes here."""

from typing import Any

from protoclip_jax.benchmark import machine
from protoclip_jax.benchmark.check_plan import ROOT, Save, Settings
from protoclip_jax.versions import missing


def run(settings: Settings, save: Save) -> dict[str, Any]:
    """Machine, devices and versions, and what of requirements.txt is not installed."""
    found = machine.describe() | machine.devices()
    return found | {"missing": missing(ROOT / "requirements.txt")}
