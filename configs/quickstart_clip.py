"""Plain CLIP on the embedded EmojiText: the baseline of configs/quickstart.py.

Command   python -m protoclip_jax.main --config=configs/quickstart_clip.py \
              --workdir=runs/quickstart_clip
"""

from pathlib import Path
from runpy import run_path


def get_config():
    config = run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.model.projection = None
    config.data.teacher = None
    config.objective.prototype = 0.0
    config.objective.external = 0.0
    config.episode.warmup = 0
    config.episode.locked = 0
    return config
