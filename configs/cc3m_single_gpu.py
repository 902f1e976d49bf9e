"""ProtoCLIP RN50 on Conceptual Captions with one GPU: the paper's small setting.

Command   python -m protoclip_jax.main --config=configs/cc3m_single_gpu.py \
              --workdir=runs/cc3m_single_gpu --config.data.train=pairs.tsv
Hardware  one GPU of 16 GB or more. Not run by us: no time is claimed.
Expected  the paper, 8 epochs: ImageNet zero-shot 14.50, linear probe 44.55 (CLIP: 12.29, 38.95).

One GPU averages nothing, so the clip norm of 10 is the reference's own.
"""

from pathlib import Path
from runpy import run_path


def get_config():
    config = run_path(str(Path(__file__).with_name("cc3m.py")))["get_config"]()
    config.model.batch_norm_group = None
    config.data.workers = 8
    config.episode.count = 100
    config.optimizer.batch = 64
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.clip_norm = 10.0
    return config
