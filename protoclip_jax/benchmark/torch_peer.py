"""The peer of our training step: open_clip in torch, in an interpreter and process of its own."""

import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from protoclip_jax.benchmark.timing import Seconds
from protoclip_jax.config import Config
from protoclip_jax.models.presets import CLIPConfig, ResNetConfig

SCRIPT = Path(__file__).parent / "torch_step.py"
START_SECONDS = 180.0
RUN_SECONDS = 600.0
END_SECONDS = 5.0


class PeerError(RuntimeError):
    """There is no peer, or it failed; the message says why."""


def start(python: str | None, config: Config, model: CLIPConfig, threads: int) -> "Peer":
    """Starts open_clip's model of the same sizes.

    Args:
      python: an interpreter with torch and open_clip; "none" for no peer; None for this one.
      config: the recipe: batch, type, optimizer.
      model: the sizes.
      threads: of the peer, if it runs on a CPU.

    Raises:
      PeerError: it is not wanted, not installed, or does not start.
    """
    if python == "none":
        raise PeerError("--peer_python=none")
    if python is None:
        missing = [n for n in ("torch", "open_clip") if importlib.util.find_spec(n) is None]
        if missing:
            raise PeerError(
                f"this interpreter has no {' and no '.join(missing)} (pip install torch "
                "open_clip_torch, here or for --peer_python=PATH)"
            )
        python = sys.executable
    return Peer(python, settings(config, model, threads))


def settings(config: Config, model: CLIPConfig, threads: int) -> dict[str, Any]:
    """What `torch_step.py` needs: open_clip's names of our sizes."""
    vision, text, optimizer = model.vision, model.text, config.optimizer
    if isinstance(vision, ResNetConfig):
        tower = {"layers": vision.layers, "head_width": 64}
    else:
        tower = {
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
        }
    return {
        "embed_dim": model.embed_dim,
        "vision_cfg": tower | {"width": vision.width, "image_size": vision.image_size},
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
        "quick_gelu": model.activation == "quickgelu",
        "batch": optimizer.batch,
        "bfloat16": config.model.dtype == "bfloat16",
        "threads": threads,
        "adamw": {
            "lr": optimizer.learning_rate,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.epsilon,
        },
        "weight_decay": optimizer.weight_decay,
        "clip_norm": optimizer.clip_norm,
    }


class Peer:
    """The other process. It waits without using a core while ours is measured.

    Attributes:
      versions: what it runs on.
    """

    def __init__(self, python: str, wanted: dict[str, Any]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), json.dumps(wanted)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                bufsize=1,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"--peer_python={python}: {error.strerror}") from error
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.versions: str = self._answer(START_SECONDS)["versions"]
        except PeerError:
            self.close()
            raise

    def run(self, steps: int, locked: bool) -> Seconds:
        """Time of some steps, with the image tower locked or not.

        Raises:
          PeerError: it failed or took too long.
        """
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps({"steps": steps, "locked": locked}) + "\n")
        answer = self._answer(RUN_SECONDS)
        return Seconds(answer["wall"], answer["cpu"])

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self) -> None:
        for text in self._process.stdout:
            self._lines.put(text)
        self._lines.put(None)

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of JSON; what else is printed on the way is not for us."""
        while True:
            try:
                text = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise PeerError(f"no answer within {seconds:.0f} seconds") from None
            if text is None:
                raise PeerError(f"it ended: {self._last_error()}")
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(text)
                if isinstance(found, dict):
                    return found

    def _last_error(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_SECONDS)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"
