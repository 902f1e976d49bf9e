import subprocess
from pathlib import Path

import jax

from protoclip_jax import versions


def test_missing_packages_of_a_requirements_file(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# a comment: grain\n\njax>=0.10,<0.13\nno.such_package-a>=1\netils[epath]>=1.12\n"
        "no-such-b; sys_platform == 'linux'\n"
    )
    assert versions.missing(path) == ["no.such_package-a", "no-such-b"]


def test_versions_of_what_is_installed():
    found = versions.versions()
    assert found["jax"] == jax.__version__
    assert set(found) == set(versions.PACKAGES)
    assert versions.version("no-such-package") is None


def test_commit_is_of_this_checkout_or_unknown():
    folder = Path(versions.__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    found = versions.commit()
    assert (found is None) == bool(head.returncode)
    if found is not None:
        assert found.removesuffix("+") == head.stdout.strip()
