"""A trained model as people use it: pictures and texts in, features out."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float
from PIL import Image

from protoclip_jax.data import augmentation, decoding
from protoclip_jax.data.padding import without_padding
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.models import clip, normalization, sharding
from protoclip_jax.models.presets import CLIPConfig

Picture = Image.Image | np.ndarray | str | Path | bytes


class Encoder:
    """Image and text towers with their preprocessing.

    Attributes:
      config: the model.
      params, batch_stats: plain nested dicts of arrays; others of the same shapes may be put in.
      image_size: side of the square the image tower sees, in pixels.
    """

    def __init__(
        self,
        config: CLIPConfig,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        batch_stats: dict[str, Any],
        *,
        batch: int = 256,
        rows: NamedSharding | None = None,
    ):
        """Args:
        config: the model.
        graphdef: its definition.
        params: its parameters.
        batch_stats: its batch statistics.
        batch: pictures or captions in one go.
        rows: how they are spread over the devices of the parameters' mesh; none = one device.
          Where those belong to several processes, all of them make the same calls, and each
          needs to give the pictures that it `supplies` only.
        """
        self.config = config
        self.params, self.batch_stats = params, batch_stats
        self.image_size = config.vision.image_size
        self._rows = rows
        # A multiple of the devices.
        self._batch = batch if rows is None else -(-batch // rows.num_devices) * rows.num_devices
        self._tokenizer = Tokenizer(config.text.context_length)
        # Every process gets all features: what is measured of them is measured on the host.
        mesh = None if rows is None else rows.mesh
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        jit = functools.partial(jax.jit, out_shardings=whole)

        @jit
        def image_features(params, batch_stats, images):
            images = augmentation.normalise(images)
            params = sharding.gathered(params, mesh)
            return _unit(clip.apply_image(graphdef, params, batch_stats, images))

        @jit
        def text_features(params, batch_stats, tokens):
            params = sharding.gathered(params, mesh)
            return _unit(clip.apply_text(graphdef, params, batch_stats, tokens))

        self._image_features, self._text_features = image_features, text_features

    def supplies(self, number: int) -> bool:
        """Whether a device of this process takes the picture at this place of a call."""
        if self._rows is None:
            return True
        place = number % self._batch
        mine = self._rows.addressable_devices_indices_map((self._batch,)).values()
        return any(place in range(*part.indices(self._batch)) for (part,) in mine)

    def encode_image(self, images: np.ndarray | Sequence[Picture]) -> Float[np.ndarray, "n e"]:
        """L2-normalised image features.

        Args:
          images: uint8 (n, h, w, 3), or a sequence of PIL images, paths, encoded bytes or uint8
            (h, w, 3) arrays. Each is resized by its shorter side and centre-cropped.

        Raises:
          UnreadableImage: a file that is no picture.
        """
        pixels = (self._pixels(image) for image in images)
        return self._in_batches(self._image_features, pixels)

    def encode_text(self, texts: str | Sequence[str]) -> Float[np.ndarray, "n e"]:
        """L2-normalised text features; a caption beyond the context is cut, its end token kept."""
        tokens = without_padding(
            self._tokenizer([texts] if isinstance(texts, str) else list(texts))
        )
        return self._in_batches(self._text_features, iter(tokens))

    def _pixels(self, image: Picture) -> np.ndarray:
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            image = decoding.decode(image)
        if isinstance(image, np.ndarray):
            if image.shape == (self.image_size, self.image_size, 3):
                return image
            image = Image.fromarray(image)
        return decoding.evaluation_crop(image, self.image_size)

    def _in_batches(self, function: Callable, rows: Iterable[np.ndarray]) -> np.ndarray:
        """Applies a compiled function to batches of one fixed size."""
        features, held = [], []

        def flush():
            count = len(held)
            block = np.stack(held + [held[-1]] * (self._batch - count))
            held.clear()
            if self._rows is not None:
                block = jax.make_array_from_callback(block.shape, self._rows, block.__getitem__)
            return function(self.params, self.batch_stats, block)[:count]

        for row in rows:
            held.append(row)
            if len(held) == self._batch:
                features.append(flush())
        if held:
            features.append(flush())
        if not features:
            return np.zeros((0, self.config.embed_dim), np.float32)
        return np.concatenate([np.asarray(block, np.float32) for block in features])


def _unit(features: jax.Array) -> jax.Array:
    return normalization.unit(features.astype(jnp.float32))
