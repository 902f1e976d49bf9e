"""A trained model as people use it: images and texts in, features out."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from protoclip_jax.data import augmentation
from protoclip_jax.data.given_images import as_many, square_pixels
from protoclip_jax.data.padding import without_padding
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.models import clip, normalization, sharding
from protoclip_jax.models.presets import CLIPConfig

# Images or texts of a call, padded to the next of these: few programs to compile, and a single
# one does not cost a large batch.
SIZES = (1, 4, 16, 64, 256)


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
        sizes: Sequence[int] = SIZES,
        rows: NamedSharding | None = None,
    ):
        """Args:
        config: the model.
        graphdef: its definition.
        params: its parameters.
        batch_stats: its batch statistics.
        sizes: images or texts in one go: the largest, and what smaller numbers are padded to.
        rows: how they are spread over the devices of the parameters' mesh; none = one device.
          Where those belong to several processes, all of them make the same calls, and each
          needs to give the images that it `supplies` only.

        Raises:
          ValueError: several sizes with devices of several processes, which have to agree on what
            each supplies.
        """
        self.config = config
        self.params, self.batch_stats = params, batch_stats
        self.image_size = config.vision.image_size
        self._rows = rows
        if rows is not None and not rows.is_fully_addressable and len(sizes) > 1:
            raise ValueError(f"an encoder of several processes has one size, not {tuple(sizes)}")
        devices = 1 if rows is None else rows.num_devices
        self._sizes = sorted({-(-size // devices) * devices for size in sizes})
        self._batch = self._sizes[-1]
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
        """Whether a device of this process takes the image at this place of a call."""
        if self._rows is None:
            return True
        place = number % self._batch
        mine = self._rows.addressable_devices_indices_map((self._batch,)).values()
        return any(place in range(*part.indices(self._batch)) for (part,) in mine)

    def encode_image(self, images: Any) -> Float[np.ndarray, "n e"]:
        """L2-normalised image features.

        However an image is given, its feature is the same: it is turned upright (EXIF), its
        transparent parts show white, then it is resized by its shorter side and centre-cropped.

        Args:
          images: a path, the bytes of a file, a PIL image, or a uint8 array (h, w, 3) with values
            from 0 to 255; or a sequence of those; or a uint8 array (n, h, w, 3). A single image
            gives one row, an empty sequence none.

        Raises:
          ValueError: another type, or an array of another form; floats are refused, since nobody
            knows whether they end at 1 or at 255, and so are PIL images of mode I and F that no
            file was opened as.
          UnreadableImage: a file that is missing or no image; a ValueError, too.
        """
        pixels = (
            square_pixels(image, self.image_size, number)
            for number, image in enumerate(as_many(images))
        )
        return self._in_batches(self._image_features, pixels)

    def encode_text(self, texts: Any) -> Float[np.ndarray, "n e"]:
        """L2-normalised text features; a caption beyond the context is cut, its end token kept.

        A text without anything to see in it (`data.captions`) is no error here: the empty one has
        a feature like any other, which says nothing of an image.

        Args:
          texts: one text, which gives one row, or a sequence of texts.

        Raises:
          ValueError: something else.
        """
        tokens = without_padding(self._tokenizer(_texts(texts)))
        return self._in_batches(self._text_features, iter(tokens))

    def _in_batches(self, function: Callable, rows: Iterable[np.ndarray]) -> np.ndarray:
        """Applies a compiled function to batches of a few fixed sizes."""
        features, held = [], []

        def flush():
            count = len(held)
            size = next(size for size in self._sizes if size >= count)
            block = np.stack(held + [held[-1]] * (size - count))
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


def _texts(texts: Any) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"wanted a text or a sequence of texts, not a {type(texts).__name__}")
    if isinstance(texts, (Mapping, Set)):
        raise ValueError(f"wanted texts in an order, not a {type(texts).__name__}")
    try:
        iterator = iter(texts)
    except TypeError as error:  # an array of no dimension looks like a sequence
        raise ValueError(f"wanted a text or a sequence of texts: {error}") from None
    texts = list(iterator)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {number} is a {type(text).__name__}: wanted a string")
    return texts


def _unit(features: jax.Array) -> jax.Array:
    return normalization.unit(features.astype(jnp.float32))
