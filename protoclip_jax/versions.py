"""What code a run or a measurement was made with: versions of packages, and the commit."""

import hashlib
import re
import subprocess
from importlib import metadata
from pathlib import Path

_NAME = re.compile(r"[\w.\-]+")
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "cykooz-resizer",
)


def versions() -> dict[str, str | None]:
    """Installed versions of `PACKAGES`; None where one is missing."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    """Installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # one without a wheel for this machine
        return None


def missing(requirements: Path) -> list[str]:
    """Packages of a requirements file that are not installed; those for other machines too."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text().splitlines())
    names = [_NAME.match(line)[0] for line in lines if line]
    return [name for name in names if version(name) is None]


def commit() -> str | None:
    """Commit of the code when it runs from a git checkout, with + for uncommitted changes."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def code_hash() -> str:
    """A hash of the package's Python files, which tells two checkouts apart."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
