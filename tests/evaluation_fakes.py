"""A model and sources that need no training, for the tests of the evaluation room."""

import io

import numpy as np
from PIL import Image

SIZE = 16
COLOURS = {
    "red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255),
    "black": (0, 0, 0), "yellow": (255, 255, 0), "cyan": (0, 255, 255), "pink": (255, 0, 255),
}  # fmt: skip


class FakeEncoder:
    """Knows colours: a picture's feature is its mean colour, a text's the mean of those it names.

    `names` adds words with their colours. A text without any known word gives a unit vector of
    its own.
    """

    image_size = SIZE

    def __init__(self, names=None):
        self.names = COLOURS | (names or {})

    def supplies(self, number):
        return True

    def encode_image(self, images):
        assert images.dtype == np.uint8
        assert images.shape[1:] == (SIZE, SIZE, 3)
        return _features(images.reshape(len(images), -1, 3).mean(axis=1))

    def encode_text(self, texts):
        known = [
            [self.names[word] for word in text.split() if word in self.names] for text in texts
        ]
        return _features(np.array([np.mean(k, axis=0) if k else (128, 128, 128) for k in known]))


class ConstantEncoder:
    """Answers everything alike: a collapsed model."""

    image_size = SIZE

    def supplies(self, number):
        return True

    def encode_image(self, images):
        return np.full((len(images), 4), 0.5, np.float32)

    def encode_text(self, texts):
        return np.full((len(texts), 4), 0.5, np.float32)


class FakeSource:
    """Pictures of one colour each, with a little noise; the caption names it."""

    def __init__(self, names, seed=0):
        self.names, self.rng = list(names), np.random.default_rng(seed)
        self.pictures = [self._picture(name) for name in self.names]

    def _picture(self, name):
        pixels = np.array(COLOURS[name]) + self.rng.integers(-40, 41, 3)
        pixels = np.broadcast_to(np.clip(pixels, 0, 255).astype(np.uint8), (SIZE, SIZE, 3))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    def __len__(self):
        return len(self.names)

    def read(self, row):
        return self.pictures[row], f"something {self.names[row]} here"

    def column(self, name):
        if name == "concept":
            return self.names
        return ["dark" if sum(COLOURS[name]) < 300 else "bright" for name in self.names]


def _features(colours):
    features = np.concatenate([colours / 127.5 - 1, np.ones((len(colours), 1))], axis=1)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def write(root, pictures):
    """`{"folder/name.png": colour}`; a colour that is bytes is written as it is."""
    for path, colour in pictures.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(colour if isinstance(colour, bytes) else FakeSource([colour]).read(0)[0])
    return root
