"""Torch names and layouts: both ways, by hand-computed layers, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoclip_jax.interop.torch_names import WeightsError, fill, from_torch, to_torch, torch_name
from protoclip_jax.models.clip import bind, initialise, split
from protoclip_jax.models.layers import Conv, Linear
from protoclip_jax.models.normalization import BatchNorm
from protoclip_jax.models.presets import (
    CLIPConfig,
    ProjectionConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from protoclip_jax.models.start import Draws
from protoclip_jax.models.transformer import Attention, torch_start

TEXT = TextConfig(context_length=7, vocab_size=11, width=8, heads=2, layers=2)
# Blocks after the first of a stage have no shortcut, so stages of one and of two blocks differ.
RESNET = CLIPConfig(6, ResNetConfig((1, 2, 1, 1), 4, 32), TEXT)
VIT = CLIPConfig(6, ViTConfig(16, 8, 8, 2, 2), TEXT)


def with_heads(config: CLIPConfig, hidden_layers: int | None) -> CLIPConfig:
    head = None if hidden_layers is None else ProjectionConfig(hidden_layers, 5, 3)
    return dataclasses.replace(config, projection=head)


KINDS = {
    f"{tower}-{'plain' if hidden is None else hidden}": with_heads(config, hidden)
    for tower, config in (("resnet", RESNET), ("vit", VIT))
    for hidden in (None, 0, 1, 2)
}


def arrays(config: CLIPConfig) -> tuple[dict, dict]:
    """Parameters and statistics of a model, every number another; nothing is compiled."""
    _, params, stats = jax.eval_shape(lambda: initialise(config, 0))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), (params, stats))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    """A state dict of the smallest model with heads."""
    return to_torch(*arrays(KINDS["vit-1"]))


# Both ways


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    config = KINDS[kind]
    ours = arrays(config)
    state = to_torch(*ours)
    # Two parameters under one name would hide each other.
    assert len(state) == len(jax.tree.leaves(ours))
    assert all(array.flags["C_CONTIGUOUS"] for array in state.values())
    assert_same(from_torch(state, config), ours)
    again = to_torch(*from_torch(state, config))
    assert_same(again, state)


@pytest.mark.parametrize("hidden_layers", [None, 0, 1, 2])
def test_names_of_the_heads(hidden_layers):
    """Torch's Sequential counts the activations too; the last number is the last Linear's."""
    state = to_torch(*arrays(with_heads(VIT, hidden_layers)))
    numbers = {name.split(".")[1] for name in state if name.startswith("text_projection_head")}
    linear = {str(3 * i) for i in range(0 if hidden_layers is None else hidden_layers + 1)}
    norms = {str(3 * i + 1) for i in range(hidden_layers or 0)}
    assert numbers == linear | norms
    assert ("logit_scale_proto" in state) == (hidden_layers is not None)
    for number in norms:
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert state[f"image_projection_head.{number}.{part}"].shape == (5,)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("logit_scale", "logit_scale"),
        ("visual/conv1/kernel", "visual.conv1.weight"),
        ("visual/bn3/running_var", "visual.bn3.running_var"),
        ("visual/layer3/12/conv2/kernel", "visual.layer3.12.conv2.weight"),
        ("visual/layer2/0/downsample/conv/kernel", "visual.layer2.0.downsample.0.weight"),
        ("visual/layer2/0/downsample/bn/bias", "visual.layer2.0.downsample.1.bias"),
        ("visual/attnpool/q_proj/kernel", "visual.attnpool.q_proj.weight"),
        ("visual/ln_pre/weight", "visual.ln_pre.weight"),
        (
            "visual/transformer/resblocks/11/attn/in_proj/bias",
            "visual.transformer.resblocks.11.attn.in_proj_bias",
        ),
        ("text/transformer/resblocks/0/mlp/c_fc/kernel", "transformer.resblocks.0.mlp.c_fc.weight"),
        ("text/token_embedding", "token_embedding.weight"),
        ("text/positional_embedding", "positional_embedding"),
        ("text/text_projection", "text_projection"),
    ],
)
def test_names_as_torch_writes_them(path, name):
    assert torch_name(path) == name


def test_a_path_that_the_table_lacks():
    with pytest.raises(KeyError, match="visual/new_layer/kernel: add it to the table"):
        torch_name("visual/new_layer/kernel")


# Layouts, by layers whose outputs are computed by hand from torch's definitions


def loaded(module, where: str, state: dict):
    """A module of ours with torch's weights, as if it stood at `where` in a model."""
    graphdef, params, stats = split(module)
    for key in reversed(where.split("/")):
        params, stats = {key: params}, {key: stats}
    params, stats = fill(state, params, stats)
    for key in where.split("/"):
        params, stats = params[key], stats[key]
    return bind(graphdef, params, stats)


def options() -> dict:
    return {"dtype": jnp.float32, "draws": Draws(jax.random.key(0))}


def test_linear_is_x_times_the_transpose():
    state = {
        "image_projection_head.0.weight": np.array([[1, 2], [3, 4], [5, 6]]),
        "image_projection_head.0.bias": np.array([0.25, 0.5, 0.75]),
    }
    layer = loaded(Linear(2, 3, **options()), "image_projection_head/layers/0", state)
    np.testing.assert_array_equal(layer.kernel[...], [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(layer(jnp.array([[1.0, 10.0]])), [[21.25, 43.5, 65.75]])


def test_square_matrices_are_transposed_too():
    """Where a forgotten transpose has the right shape."""
    state = {
        "visual.attnpool.q_proj.weight": np.array([[1, 2], [3, 4]]),
        "visual.attnpool.q_proj.bias": np.zeros(2),
    }
    layer = loaded(Linear(2, 2, **options()), "visual/attnpool/q_proj", state)
    np.testing.assert_array_equal(layer(jnp.array([[1.0, 10.0]])), [[21, 43]])


def test_projections_that_torch_multiplies_from_the_right_stay():
    """`visual.proj` and `text_projection` are bare matrices there: x @ proj."""
    matrix = np.arange(6.0).reshape(2, 3)
    like = {
        "visual": {"proj": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
        "text": {"text_projection": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
    }
    params, _ = fill({"visual.proj": matrix, "text_projection": matrix}, like, {})
    np.testing.assert_array_equal(params["visual"]["proj"], matrix)
    np.testing.assert_array_equal(params["text"]["text_projection"], matrix)


def test_convolution_reads_rows_then_columns():
    # (out, in, height, width); the second input channel counts three times as much.
    square = np.array([[1, 10], [100, 1000]])
    weight = np.array([[square, 3 * square], [2 * square, 0 * square]])
    layer = loaded(Conv(2, 2, 2, stride=2, **options()), "visual/conv1", weight_of(weight))
    picture = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    rows, channels = picture[None, :, :, None], jnp.array([1.0, 2.0])
    # 1 * 1 + 2 * 10 + 3 * 100 + 4 * 1000 = 4321; the second channel has twice the pixels.
    expected = [4321 + 2 * 3 * 4321, 2 * 4321]
    np.testing.assert_array_equal(layer(rows * channels), [[[expected]]])


def weight_of(weight: np.ndarray) -> dict:
    return {"visual.conv1.weight": weight}


def test_convolution_axes_of_four_sizes():
    """Each axis of another length, and every entry says where it stood."""
    o, i, h, w = np.indices((2, 3, 4, 5))
    like = {"visual": {"conv1": {"kernel": jax.ShapeDtypeStruct((4, 5, 3, 2), jnp.float32)}}}
    params, _ = fill(weight_of(1000 * o + 100 * i + 10 * h + w), like, {})
    h, w, i, o = np.indices((4, 5, 3, 2))
    kernel = params["visual"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, 1000 * o + 100 * i + 10 * h + w)


def test_attention_packs_query_key_value():
    """Two tokens (1, 0) and (0, 1). Keys are the tokens, every query is (sqrt 2 ln 3, 0).

    The scores, divided by sqrt 2, are ln 3 and 0: weights 3/4 and 1/4. The values are the columns
    (1, 3) and (2, 4) of v's matrix, their mean (1.25, 3.25).
    """
    query, key, value = np.zeros((2, 2)), np.eye(2), np.array([[1, 2], [3, 4]])
    prefix = "transformer.resblocks.0.attn"
    state = {
        f"{prefix}.in_proj_weight": np.concatenate([query, key, value]),
        f"{prefix}.in_proj_bias": np.array([np.sqrt(2) * np.log(3), 0, 0, 0, 0, 0]),
        f"{prefix}.out_proj.weight": np.array([[1, 10], [100, 1000]]),
        f"{prefix}.out_proj.bias": np.array([0.25, 0.5]),
    }
    module = Attention(2, 1, torch_start(2), **options())
    layer = loaded(module, "text/transformer/resblocks/0/attn", state)
    mixed = [1.25 + 32.5 + 0.25, 125 + 3250 + 0.5]
    actual = layer(jnp.eye(2)[None], causal=False)
    np.testing.assert_allclose(actual, [[mixed, mixed]], rtol=1e-5)


def test_batch_norm_finds_its_statistics():
    """(6 - 2) / sqrt(4) * 3 + 1 = 7: scale, shift, mean and variance each in their place."""
    state = {
        "visual.bn1.weight": np.array([3.0]),
        "visual.bn1.bias": np.array([1.0]),
        "visual.bn1.running_mean": np.array([2.0]),
        "visual.bn1.running_var": np.array([4.0]),
        "visual.bn1.num_batches_tracked": np.array(12),
    }
    layer = loaded(BatchNorm(1), "visual/bn1", state)
    np.testing.assert_allclose(layer(jnp.array([[6.0]]), train=False), [[7.0]], rtol=1e-5)


# What is accepted


def test_parallel_wrappers_prefix(state):
    wrapped = {f"module.{name}": array for name, array in state.items()}
    assert_same(from_torch(wrapped, KINDS["vit-1"]), from_torch(state, KINDS["vit-1"]))


def test_entries_that_are_no_weights(state):
    extra = {
        "image_projection_head.1.num_batches_tracked": np.array(3),
        "input_resolution": np.array(16),
        "context_length": np.array(7),
        "vocab_size": np.array(11),
    }
    assert_same(from_torch(state | extra, KINDS["vit-1"]), from_torch(state, KINDS["vit-1"]))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_any_float_type_becomes_float32(state, dtype):
    found = from_torch({name: a.astype(dtype) for name, a in state.items()}, KINDS["vit-1"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
    exact = from_torch(state, KINDS["vit-1"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-3), found, exact)


def test_what_is_loaded_is_a_copy(state):
    params, _ = from_torch(state, KINDS["vit-1"])
    params["text"]["token_embedding"][:] = -1
    assert state["token_embedding.weight"].min() >= 0


# What is refused


def test_all_faults_in_one_message(state):
    faulty = dict(state)
    del faulty["logit_scale"], faulty["ln_final.bias"]
    faulty["visual.head.weight"] = np.zeros(3)
    faulty["visual.head.bias"] = np.zeros(3)
    # A Linear as jax stores it, and an embedding of another vocabulary.
    faulty["transformer.resblocks.1.mlp.c_fc.weight"] = np.zeros((8, 32), np.float32)
    faulty["token_embedding.weight"] = np.zeros((12, 8), np.float32)
    with pytest.raises(WeightsError) as raised:
        from_torch(faulty, KINDS["vit-1"])
    error, message = raised.value, str(raised.value)
    assert sorted(error.missing) == ["ln_final.bias", "logit_scale"]
    assert error.unused == ["visual.head.bias", "visual.head.weight"]
    assert sorted(error.misshaped) == [
        "token_embedding.weight (12, 8) instead of (11, 8)",
        "transformer.resblocks.1.mlp.c_fc.weight (8, 32) instead of (32, 8)",
    ]
    for fault in (*error.missing, *error.unused, *error.misshaped):
        assert fault in message
    for count in ("2 missing", "2 not in the model", "2 other shape"):
        assert count in message


@pytest.mark.parametrize("kind", ["missing", "unused", "misshaped"])
def test_each_fault_alone_is_refused(state, kind):
    if kind == "missing":
        del state["visual.class_embedding"]
    elif kind == "unused":
        state["visual.class_embeding"] = state["visual.class_embedding"]
    else:
        # A row less: numpy would broadcast it without a word if it were let through.
        state["visual.class_embedding"] = state["visual.class_embedding"][:1]
    with pytest.raises(WeightsError, match=r"visual\.class_embed") as raised:
        from_torch(state, KINDS["vit-1"])
    found = {name: getattr(raised.value, name) for name in ("missing", "unused", "misshaped")}
    assert [name for name, faults in found.items() if faults] == [kind]


def test_long_lists_are_counted_and_kept_whole():
    """Another kind of tower: the message stays readable, the error holds every name."""
    state = to_torch(*arrays(KINDS["resnet-plain"]))
    with pytest.raises(WeightsError, match=r"and \d+ more") as raised:
        from_torch(state, KINDS["vit-plain"])
    towers = [name for name in state if name.startswith("visual.")]
    # Both have a first convolution, of other shapes.
    assert raised.value.unused == sorted(set(towers) - {"visual.conv1.weight"})
    assert "visual.class_embedding" in raised.value.missing
    assert [fault.split()[0] for fault in raised.value.misshaped] == ["visual.conv1.weight"]
    assert len(str(raised.value)) < 5000


@pytest.mark.parametrize("heads", [("vit-plain", "vit-1"), ("vit-1", "vit-plain")])
def test_heads_on_one_side_only(heads):
    """Neither a model without trained heads nor weights left behind pass quietly."""
    theirs, ours = heads
    state = to_torch(*arrays(KINDS[theirs]))
    with pytest.raises(WeightsError, match="choose the preset and the projection heads") as raised:
        from_torch(state, KINDS[ours])
    found = raised.value.unused if ours == "vit-plain" else raised.value.missing
    per_head = 2 + 4 + 2  # Linear, BatchNorm with statistics, Linear
    assert len(found) == 2 * per_head + 1
    assert "logit_scale_proto" in found


def test_nothing_is_changed_on_error(state):
    """Neither the tree that would be filled nor the state dict, though most names fit."""
    del state["logit_scale"]
    names, before = list(state), {name: array.copy() for name, array in state.items()}
    params, stats = jax.tree.map(np.zeros_like, arrays(KINDS["vit-1"]))
    with pytest.raises(WeightsError):
        fill(state, params, stats)
    assert not any(leaf.any() for leaf in jax.tree.leaves((params, stats)))
    assert list(state) == names
    assert_same(state, before)
