"""ProtoCLIP on the embedded EmojiText, with the text teacher."""

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
    config.episode.count = 12
    config.episode.size = 6804
    config.episode.warmup = 2
    config.episode.locked = 1
    config.episode.prototypes = 600
    config.objective.external = 1.0
    config.optimizer.batch = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 60
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 10.0
    config.evaluation.suite = "emoji_text"
    return config
