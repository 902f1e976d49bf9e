"""The total objective: golden totals, what is skipped, and what is logged."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close_to_max, golden

from protoclip_jax.objectives.total import Weights, feature_statistics, total_loss

TOTALS = sorted(
    {key.split("/")[0] for key in golden("losses", "total/")},
)


class Features(NamedTuple):
    image: jax.Array
    text: jax.Array
    image_projected: jax.Array | None
    text_projected: jax.Array | None


@pytest.fixture(scope="module")
def batch():
    """(features, scales, labels, prototypes) of the golden batch."""
    arrays = golden("losses", "in/")
    rows = len(arrays["image_features"])
    features = Features(
        *(
            jnp.asarray(arrays[name])
            for name in ("image_features", "text_features", "image_projected", "text_projected")
        )
    )
    scales = {
        "logit_scale": jnp.asarray(arrays["logit_scale_param"]),
        "logit_scale_proto": jnp.asarray(arrays["logit_scale_proto_param"]),
    }
    labels, counts = {}, {}
    for name in ("image", "text", "external"):
        labels[name] = jnp.asarray(arrays[f"{name}_labels"][:rows])
        k = len(arrays[f"{name}_centroids"])
        counts[name] = jnp.asarray(np.bincount(arrays[f"{name}_labels"], minlength=k), jnp.int32)
    prototypes = {
        name: {"centroids": arrays[f"{name}_centroids"], "counts": counts[name]}
        for name in ("image", "text")
    } | {
        "text_in_image": arrays["pbt_centroids_img_from_text"],
        "image_in_text": arrays["pbt_centroids_text_from_img"],
        "external": {
            "in_image": arrays["pbt_centroids_img_from_ext"],
            "in_text": arrays["pbt_centroids_text_from_ext"],
            "counts": counts["external"],
        },
    }
    return features, scales, labels, prototypes


def run(batch, weights, temperature=0.01, back_translation=True, mask_unused=False, **options):
    """((loss, metrics), (gradients of the features, of the scales)), jitted."""
    features, scales, labels, prototypes = batch

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def step(features, scales, labels, prototypes):
        return total_loss(
            features,
            scales,
            labels,
            prototypes,
            weights,
            temperature,
            back_translation,
            mask_unused,
            **options,
        )

    return step(features, scales, labels, prototypes)


def replaced(batch, **prototypes):
    return (*batch[:3], batch[3] | prototypes)


@pytest.mark.accelerator
@pytest.mark.core
@pytest.mark.parametrize("compute_all", [True, False], ids=["all", "weighted"])
@pytest.mark.parametrize("case", TOTALS)
def test_golden_totals(batch, case, compute_all):
    expected = golden("losses", f"total/{case}/")
    *weights, temperature = (float(x) for x in expected["weights"])
    (loss, metrics), (grads, scale_grads) = run(
        batch,
        Weights(*weights),
        None if temperature < 0 else temperature,
        compute_all=compute_all,
    )
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(metrics["loss/total"], loss)
    names = {"loss_clip": "clip", "loss_proto": "prototype", "loss_external": "external"}
    for (key, name), weight in zip(names.items(), weights, strict=True):
        if compute_all or weight:
            np.testing.assert_allclose(metrics[f"loss/{name}"], expected[key], atol=1e-5, rtol=1e-5)
        else:
            assert not [key for key in metrics if key.startswith(f"loss/{name}")]
    for name, grad in grads._asdict().items():
        assert_close_to_max(grad, expected[f"grad_{name}"], 1e-5, name)
    for name, grad in scale_grads.items():
        assert_close_to_max(grad, expected[f"grad_{name}_param"], 1e-5, name)


@pytest.mark.core
@pytest.mark.parametrize("target", ["T0.01", "T0.1", "hard"])
@pytest.mark.parametrize("translated", ["pbt", "nopbt"])
def test_golden_sides(batch, target, translated):
    """Each side is scored against the right prototypes under the right labels."""
    temperature = None if target == "hard" else float(target[1:])
    external = translated == "pbt"
    (_, metrics), _ = run(
        batch,
        Weights(0, 1, 1 if external else 0),
        temperature,
        back_translation=translated == "pbt",
    )
    sides = {
        "prototype_image": f"proto/{target}/{translated}/img2text/",
        "prototype_text": f"proto/{target}/{translated}/text2img/",
    }
    if external:
        sides |= {"external_image": "external/img2ext/", "external_text": "external/text2ext/"}
    for name, key in sides.items():
        expected = golden("losses", key)
        np.testing.assert_allclose(metrics[f"loss/{name}"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics[f"accuracy/{name}"], expected["acc"], atol=1e-4)


@pytest.mark.parametrize("mask_unused", [True, False])
def test_equal_on_one_and_eight_devices(batch, mesh, mask_unused):
    features, scales, labels, prototypes = batch
    repeats = -(-16 // len(features.image))
    wider = jax.tree.map(lambda x: jnp.tile(x, (repeats,) + (1,) * (x.ndim - 1))[:16], features)
    labels = jax.tree.map(lambda x: jnp.tile(x, repeats)[:16], labels)
    batch = (wider, scales, labels, prototypes)
    weights = Weights(1, 0.5, 0.25)
    (loss, metrics), grads = run(batch, weights, mask_unused=mask_unused)
    (loss8, metrics8), grads8 = run(batch, weights, mask_unused=mask_unused, mesh=mesh)
    np.testing.assert_allclose(loss8, loss, rtol=1e-5)
    assert metrics8.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics8[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(grads8), jax.tree.leaves(grads), strict=True):
        assert_close_to_max(a, b, 1e-4)


def test_prototypes_without_members_are_masked(batch):
    """Masking equals leaving the empty clusters out of every array beforehand."""
    features, scales, labels, prototypes = batch
    short = {"external": {}}
    new_labels = {}
    for name in ("image", "text", "external"):
        kept = np.flatnonzero(prototypes[name]["counts"] > 0)
        assert len(kept) < len(prototypes[name]["counts"])
        short[name] = {key: value[kept] for key, value in prototypes[name].items()}
        new_labels[name] = jnp.asarray(np.searchsorted(kept, labels[name]), jnp.int32)
        back = {"text": "text_in_image", "image": "image_in_text"}.get(name)
        if back:
            short[back] = prototypes[back][kept]
    weights = Weights(1, 1, 1)
    masked = run(batch, weights, mask_unused=True)
    without = run((features, scales, new_labels, short), weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), masked, without
    )
    assert not np.isclose(masked[0][0], run(batch, weights)[0][0], rtol=1e-4)


def test_weight_zero_is_not_computed(batch):
    """NaN prototypes poison the reference's 0 * L, and nothing here."""
    features = batch[0]
    broken = replaced(batch, text_in_image=jnp.full_like(batch[3]["text_in_image"], jnp.nan))
    (loss, metrics), grads = run(broken, Weights(1, 0, 0))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, metrics, grads)))
    assert np.isnan(run(broken, Weights(1, 0, 0), compute_all=True)[0][0])
    bare = features._replace(image_projected=None, text_projected=None)
    (bare_loss, _), _ = run((bare, *batch[1:]), Weights(1, 0, 0))
    np.testing.assert_array_equal(bare_loss, loss)
    (plain_loss, _), _ = run((bare, batch[1], {}, {}), Weights(1, 0, 0), compute_all=True)
    np.testing.assert_array_equal(plain_loss, loss)


def test_names_of_metrics(batch):
    (_, metrics), _ = run(batch, Weights(1, 1, 1))
    sides = [f"{term}_{side}" for term in ("prototype", "external") for side in ("image", "text")]
    assert set(metrics) == {
        *(f"loss/{name}" for name in ("total", "clip", "prototype", "external", *sides)),
        *(f"accuracy/{name}" for name in sides),
        *(f"temperature/{name}" for name in ("clip", "prototype")),
        *(f"geometry/{n}" for n in ("image_std", "text_std", "modality_gap", "pair_similarity")),
    }
    for name, key in (("clip", "logit_scale"), ("prototype", "logit_scale_proto")):
        np.testing.assert_allclose(
            metrics[f"temperature/{name}"], 1 / np.exp(np.float64(batch[1][key])), rtol=1e-6
        )


def test_feature_statistics_equal_float64(batch):
    image, text = (np.float64(x) for x in batch[0][:2])
    actual = feature_statistics(*batch[0][:2])
    expected = {
        "geometry/image_std": np.mean(np.std(image, axis=0, ddof=1)),
        "geometry/text_std": np.mean(np.std(text, axis=0, ddof=1)),
        "geometry/modality_gap": np.linalg.norm(image.mean(0) - text.mean(0)),
        "geometry/pair_similarity": np.mean(np.sum(image * text, axis=1)),
    }
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_statistics_of_bfloat16_features_are_float32(batch):
    image, text = (x.astype(jnp.bfloat16) for x in batch[0][:2])
    narrow = feature_statistics(image, text)
    wide = feature_statistics(image.astype(jnp.float32), text.astype(jnp.float32))
    assert {value.dtype for value in narrow.values()} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def test_metrics_carry_no_gradient(batch):
    def logged(features, name):
        out = total_loss(features, *batch[1:], Weights(1, 1, 1), 0.01, True, False)
        return out[1][name]

    for leaf in jax.tree.leaves(jax.grad(logged)(batch[0], "loss/prototype_image")):
        np.testing.assert_array_equal(leaf, 0)


def test_refused(batch):
    features, scales, labels, prototypes = batch
    bare = features._replace(image_projected=None, text_projected=None)
    two = {name: labels[name] for name in ("image", "text")}
    no_external = {name: value for name, value in prototypes.items() if name != "external"}
    proto, external = Weights(1, 1, 0), Weights(1, 0, 1)
    cases = [
        (batch, Weights(0, 0, 0), True, "nothing to train"),
        ((bare, *batch[1:]), proto, True, "no projection heads"),
        ((bare, *batch[1:]), external, True, "no projection heads"),
        (batch, external, False, "back translation is off"),
        ((features, scales, two, prototypes), external, True, "no external labels"),
        ((features, scales, labels, no_external), external, True, "no external labels"),
    ]
    for given, weights, back_translation, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            total_loss(*given, weights, 0.01, back_translation, False)
        assert "\n" not in str(error.value)
