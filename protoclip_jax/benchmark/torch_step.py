"""Trains open_clip's CLIP on one made-up batch; a script for an interpreter with torch.

Takes the settings as JSON in its only argument, answers {"versions": ...} when the model is built,
then for each line {"steps": 3, "locked": false} of its input {"wall": ..., "cpu": ...} in seconds.
Imports nothing of this package, whose dependencies that interpreter need not have.
"""

import contextlib
import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path

# The names of the modules beside this file are not meant for other packages.
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]


class _Anything(type):
    """Of a class whose attributes are all there, and None."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)


class _Absent(types.ModuleType):
    """A module whose every name is an empty class: enough to import what is never called."""

    __path__: tuple = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def stub_torchvision():
    """open_clip imports torchvision for its data loading; the model does without."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        parts = ("datasets", "models.feature_extraction", "ops.misc", "transforms.functional")
        names = {"torchvision", *(f"torchvision.{part}" for part in parts)}
        names |= {name.rpartition(".")[0] for name in names if "." in name}
        for name in sorted(names):
            sys.modules[name] = _Absent(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])


class Trainer:
    """Model, optimizer and batch."""

    def __init__(self, settings):
        import torch
        from open_clip.model import CLIP

        torch.manual_seed(0)
        torch.set_num_threads(settings["threads"])
        self.torch, self.settings = torch, settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        sizes = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
        self.model = CLIP(**{name: settings[name] for name in sizes}, output_dict=True)
        self.model = self.model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.groups(), **settings["adamw"])
        rows, text = settings["batch"], settings["text_cfg"]
        side = settings["vision_cfg"]["image_size"]
        self.images = torch.randn(rows, 3, side, side, device=self.device)
        tokens = torch.randint(1, text["vocab_size"] - 1, (rows, text["context_length"]))
        tokens[:, -1] = text["vocab_size"] - 1
        self.tokens = tokens.to(self.device)
        self.target = torch.arange(rows, device=self.device)

    def groups(self):
        """Gains and biases do not decay, as in open_clip's own training."""
        decays, stays = [], []
        for name, parameter in self.model.named_parameters():
            small = parameter.ndim < 2 or any(x in name for x in ("bn", "ln", "bias", "logit"))
            (stays if small else decays).append(parameter)
        decay = self.settings["weight_decay"]
        return [
            {"params": stays, "weight_decay": 0.0},
            {"params": decays, "weight_decay": decay},
        ]

    def lock(self, locked):
        """Keeps the image tower, and its batch statistics, as they are."""
        for parameter in self.model.visual.parameters():
            parameter.requires_grad_(not locked)
            if locked:
                parameter.grad = None
        self.model.visual.train(not locked)

    def loss(self):
        """InfoNCE of the batch."""
        functional = self.torch.nn.functional
        autocast = contextlib.nullcontext()
        if self.settings["bfloat16"]:
            autocast = self.torch.autocast(self.device, dtype=self.torch.bfloat16)
        with autocast:
            found = self.model(self.images, self.tokens)
        image, text = found["image_features"].float(), found["text_features"].float()
        logits = found["logit_scale"] * image @ text.T
        loss = functional.cross_entropy(logits, self.target)
        return (loss + functional.cross_entropy(logits.T, self.target)) / 2

    def step(self):
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        norm = self.settings["clip_norm"]
        if norm is not None:
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        self.optimizer.step()
        with self.torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)

    def run(self, steps, locked):
        """Seconds of some steps."""
        self.lock(locked)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main():
    """Answers until the input ends."""
    settings = json.loads(sys.argv[1])
    stub_torchvision()
    trainer = Trainer(settings)
    import open_clip
    import torch

    place = "CUDA" if trainer.device == "cuda" else f"{torch.get_num_threads()} threads"
    versions = f"open_clip {open_clip.__version__}, torch {torch.__version__}, {place}"
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
