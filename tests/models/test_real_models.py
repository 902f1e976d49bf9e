"""The published sizes with formula-filled weights, against open_clip and the reference."""

import dataclasses
import functools
import zlib

import jax
import numpy as np
import pytest
from golden_files import assert_close_to_max, golden, golden_json
from golden_models import recorded

from protoclip_jax.interop.torch_names import from_torch, to_torch
from protoclip_jax.models.clip import LOGIT_SCALE, bind, initialise, split
from protoclip_jax.models.normalization import unit
from protoclip_jax.models.presets import PRESETS, ProjectionConfig, preset

pytestmark = pytest.mark.core

VALUES, FIRST, NORMS = 1e-4, 1e-3, 1e-4
FILL = golden_json("fill")
MODELS = {name: facts for name, facts in golden_json("real_models").items() if type(facts) is dict}


def config_of(name: str):
    shapes = MODELS[name]["shapes"]
    base = name.removesuffix("_protoclip")
    quick = name != base and f"{base}-quickgelu" in PRESETS  # the reference always uses QuickGELU
    config = preset(f"{base}-quickgelu" if quick else base)
    heads = [v for k, v in shapes.items() if k.startswith("image_projection_head") and len(v) == 2]
    if heads:
        projection = ProjectionConfig(len(heads) - 1, heads[0][0], heads[-1][0])
        config = dataclasses.replace(config, projection=projection)
    return config


def hashed(count: int, start: int) -> np.ndarray:
    """`hash(n, start)` of the golden README: float64 in [-0.5, 0.5)."""
    x = np.arange(count, dtype=np.uint32)
    x += np.uint32((start + FILL["SALT"]) % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    u = x.astype(np.float64)
    u *= 2.0**-32
    u -= 0.5
    return u


def scale_and_shift(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """The README's rules: the factor of u, and what is added."""
    last = name.split(".")[-1]
    if last in ("logit_scale", "logit_scale_proto"):
        return 0.0, LOGIT_SCALE
    if last == "running_var":
        return 0.25, 1.0
    if last in ("running_mean", "bias", "in_proj_bias") or name == "token_embedding.weight":
        return 0.1, 0.0
    if name == "positional_embedding":
        return 0.1, 0.0
    if last == "positional_embedding":
        return shape[1] ** -0.5, 0.0
    if last in ("class_embedding", "text_projection", "proj"):
        return shape[0] ** -0.5, 0.0
    if len(shape) == 1:
        small = name.startswith("visual.layer") and name.endswith(".bn3.weight")
        return (0.03, 0.3) if small else (0.1, 1.0)
    if len(shape) == 2:
        return shape[1] ** -0.5, 0.0
    gain = 2 if name.startswith(("visual.layer", "visual.conv2", "visual.conv3")) else 1
    return (gain / np.prod(shape[1:])) ** 0.5, 0.0


@functools.cache
def filled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    factor, shift = scale_and_shift(name, shape)
    if factor == 0:
        return np.full(shape, shift, np.float32)
    u = hashed(int(np.prod(shape)), zlib.crc32(name.encode()))
    u *= np.sqrt(12)
    u *= factor
    u += shift
    return u.astype(np.float32).reshape(shape)


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Two pictures (NHWC) and two texts."""
    c, y, x = np.indices((3, 224, 224)).astype(np.float64)
    noise = [hashed(c.size, seed).reshape(c.shape) for seed in (1, 2)]
    first = np.sin(0.05 * x + 0.3 * c) + 0.7 * np.cos(0.08 * y - 0.2 * c) + 0.3 * noise[0]
    second = np.sin(0.0006 * (x - 112) ** 2 + 0.001 * (y - 90) ** 2 + c) + 0.5 * noise[1]
    images = np.stack([first, second]).astype(np.float32).transpose(0, 2, 3, 1)
    tokens = np.zeros((2, 77), np.int32)
    tokens[0, :10] = [49406, 320, 1125, 539, 320, 2368, 6635, 1237, 269, 49407]
    middle = [(k * FILL["MUL"]) % 49000 + 1 for k in range(1, 41)]
    tokens[1, :42] = [49406, *middle, 49407]
    return images, tokens


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Gives the memory of the weights back."""
    yield
    filled.cache_clear()


def model_of(name: str):
    facts = MODELS[name]
    buffers = {k: v for k, v in facts["buffers"].items() if not k.endswith("num_batches_tracked")}
    state = {k: filled(k, tuple(v)) for k, v in (facts["shapes"] | buffers).items()}
    for parameter, norm in facts["filled_l2norm_by_name"].items():
        np.testing.assert_allclose(np.linalg.norm(state[parameter]), norm, rtol=1e-5)
    config = config_of(name)
    graphdef, *_ = jax.eval_shape(lambda: initialise(config, 0))
    return bind(graphdef, *from_torch(state, config))


# The towers are compiled by themselves, so that models with equal towers share the program.
@functools.partial(jax.jit, static_argnames=("graphdef", "stages", "options"))
def run(graphdef, params, stats, x, stages=(), options=()):
    """Output, wanted stages and moved statistics of a tower."""
    tower = bind(graphdef, params, stats)
    with jax.default_matmul_precision("highest"), recorded(tower) as outputs:
        y = tower(x, **dict(options))
        # Ours applies these norms only to the token that counts.
        last = outputs.get("transformer/resblocks/11")
        for norm in ("ln_post", "ln_final"):
            if norm in stages:
                outputs[norm] = getattr(tower, norm)(last)
    wanted = {name: stem(outputs) if name == "stem" else outputs[name] for name in stages}
    return y, wanted, split(tower)[2]


def stem(outputs):
    x = jax.nn.relu(outputs["bn3"])
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def stage_path(name: str, outputs_of: str) -> str:
    """Path within its tower of a stage named as in torch."""
    name = name.removeprefix("visual.") if outputs_of == "visual" else name
    if name == "avgpool":
        return "stem"
    if name.startswith("layer"):
        stage = int(name.removeprefix("layer"))
        return f"layer{stage}/{preset('RN50').vision.layers[stage - 1] - 1}"
    return name.replace(".", "/")


def check_stages(name: str, tower: str, stages: dict):
    expected = golden("real_models", f"{name}/")
    for torch_stage, path in stage_names(name, tower).items():
        shape = tuple(expected[f"stage_shape/{torch_stage}"])
        array = np.asarray(stages[path])
        if array.ndim == 4:
            array = array.transpose(0, 3, 1, 2)
        elif array.ndim == 3 and len(shape) == 2:
            array = array[:, 0]
        elif array.ndim == 3 and shape[0] != array.shape[0]:
            array = array.transpose(1, 0, 2)
        assert array.shape == shape
        norm = np.linalg.norm(array.astype(np.float64))
        what = f"{name} {torch_stage}"
        assert norm == pytest.approx(expected[f"stage_l2norm/{torch_stage}"], rel=NORMS), what
        assert array.mean() == pytest.approx(expected[f"stage_mean/{torch_stage}"], abs=1e-5), what
        assert_close_to_max(
            array.ravel()[:16], expected[f"stage_first16/{torch_stage}"], FIRST, what
        )


def stage_names(name: str, tower: str) -> dict[str, str]:
    names = golden("real_models", f"{name}/stage_shape/")
    mine = [n for n in names if n.startswith("visual.") == (tower == "visual")]
    return {n: stage_path(n, tower) for n in mine}


def empty(tree):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.uint8), tree)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_counts(name):
    facts, config = MODELS[name], config_of(name)
    _, params, stats = jax.eval_shape(lambda: initialise(config, 0))
    shapes = {k: list(v.shape) for k, v in to_torch(empty(params), {}).items()}
    assert shapes == facts["shapes"]
    buffers = {k: list(v.shape) for k, v in to_torch({}, empty(stats)).items()}
    counters = {k for k in facts["buffers"] if k.endswith("num_batches_tracked")}
    assert buffers == {k: v for k, v in facts["buffers"].items() if k not in counters}
    assert count(params) == facts["parameter_count"]
    assert count(params["visual"]) == facts["visual_parameter_count"]
    assert len(shapes) == facts["n_parameters"]


@pytest.mark.parametrize("name", MODELS)
def test_features(name):
    expected, model = golden("real_models", f"{name}/"), model_of(name)
    embeddings = {}
    for side, tower, x in zip(("image", "text"), ("visual", "text"), inputs(), strict=True):
        stages = tuple(stage_names(name, tower).values())
        graphdef, params, stats = split(getattr(model, tower))
        y, outputs, _ = run(graphdef, params, stats, x, stages)
        embeddings[side] = y
        assert_close_to_max(y, expected[f"{side}_features"], VALUES, f"{name} {side}")
        check_stages(name, tower, outputs)
    for key, value in golden("real_models", f"{name}/forward_eval/").items():
        if key.startswith("logit_scale"):
            ours = np.exp(getattr(model, key)[...])
        else:
            side, _, projected = key.partition("_features")
            ours = embeddings[side]
            if projected:
                head = split(getattr(model, f"{side}_projection_head"))
                ours, *_ = run(*head, ours, options=(("train", False),))
            ours = unit(ours)
        assert_close_to_max(ours, value, VALUES, key)
    if "image_features_train_mode" in expected:
        check_training(name, model, expected)


def check_training(name: str, model, expected: dict):
    """Batch statistics of the image tower, and the running ones after one forward."""
    graphdef, params, stats = split(model.visual)
    y, _, moved = run(graphdef, params, stats, inputs()[0], options=(("train", True),))
    assert_close_to_max(y, expected["image_features_train_mode"], VALUES, name)
    moved = to_torch({}, {"visual": moved})
    suffix = "_after_train_forward"
    buffers = [key for key in expected if key.endswith(suffix)]
    assert buffers
    for key in buffers:
        module, _, kind = key.removesuffix(suffix).rpartition("_running_")
        assert_close_to_max(moved[f"visual.{module}.running_{kind}"], expected[key], VALUES, key)
