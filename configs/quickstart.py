"""ProtoCLIP on the embedded EmojiText, with the text teacher: all three phases in minutes.

Command   bash launch/quickstart.sh, or
          python -m protoclip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
Hardware  2 CPU cores, 8 GB; time and result of a real run are in the README.
"""

from protoclip_jax.recipe import defaults


def get_config():
    config = defaults()
    config.model.name = "tiny-rn"
    config.model.projection = 1
    config.model.projection_hidden = 256
    config.model.projection_width = 64
    config.model.dtype = "float32"
    config.data.train = "emoji_text/train"
    config.data.teacher = "emoji_text"
    config.data.augmentation = "clip"  # the light set's blur costs a CPU as much as the model
    config.episode.count = 9
    config.episode.size = 3200
    config.episode.warmup = 3
    config.episode.locked = 1
    config.episode.prototypes = 320
    config.objective.external = 1.0
    config.optimizer.batch = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 10.0
    config.evaluation.suite = "emoji_text"
    config.log.every = 25
    return config
