"""Plain CLIP RN50 on Conceptual Captions: the baseline of configs/cc3m.py, on the same code.

Command   python -m protoclip_jax.main --config=configs/cc3m_clip.py --workdir=runs/cc3m_clip \
              --config.data.train=pairs.tsv
Hardware  as configs/cc3m.py. Not run by us: no time is claimed.
Expected  the paper: ImageNet zero-shot 19.46, linear probe 49.41.
"""

from pathlib import Path
from runpy import run_path


def get_config():
    config = run_path(str(Path(__file__).with_name("cc3m.py")))["get_config"]()
    config.model.projection = None
    config.objective.prototype = 0.0
    config.episode.warmup = 0
    config.episode.locked = 0
    return config
