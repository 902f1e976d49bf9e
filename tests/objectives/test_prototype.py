"""The prototype loss against the golden values, plain float64, and itself on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close_to_max, golden

from protoclip_jax.objectives.prototype import prototype_loss

TEMPERATURES = {"T0.01": 0.01, "T0.1": 0.1, "hard": None}


@functools.partial(jax.jit, static_argnames=("temperature", "mesh"))
def loss_and_grads(features, scale, student, teacher, labels, used, temperature, mesh=None):
    """((loss, accuracy), (gradient of the features, gradient of the raw logit scale))."""

    def loss(features, scale):
        return prototype_loss(
            features, scale, student, teacher, labels, used, temperature, mesh=mesh
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(features, scale)


def check_golden(case, features, student, teacher, labels, temperature, scale, used=None):
    expected = golden("losses", case)
    (loss, accuracy), (grad, scale_grad) = loss_and_grads(
        features, scale, student, teacher, labels, used, temperature
    )
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(accuracy, expected["acc"], atol=1e-4)
    assert_close_to_max(grad, expected["grad_student"], 1e-5, "feature gradient")
    assert_close_to_max(scale_grad, expected["grad_logit_scale_param"], 1e-5, "scale gradient")


def plain(features, scale, student, teacher, labels, used, temperature):
    """Loss and feature gradient in float64, row by row, over the used prototypes only."""
    features, student = np.float64(features), np.float64(student)
    grad = np.zeros_like(features)
    losses = []
    kept = np.flatnonzero(used)
    rows = [i for i, label in enumerate(labels) if label in kept]
    for i in rows:
        scores = np.exp(np.float64(scale)) * student[kept] @ features[i]
        student_p = np.exp(scores - scores.max())
        student_p /= student_p.sum()
        if temperature is None:
            target = (kept == labels[i]).astype(float)
        else:
            similar = np.float64(teacher)[kept] @ np.float64(teacher)[labels[i]] / temperature
            target = np.exp(similar - similar.max())
            target /= target.sum()
        losses.append(-np.sum(target * np.log(student_p)))
        grad[i] = np.exp(np.float64(scale)) * (student_p - target) @ student[kept] / len(rows)
    return np.mean(losses), grad


@pytest.fixture(scope="module")
def inputs():
    arrays = golden("losses", "in/")
    rows = len(arrays["image_projected"])
    for name in ("image_labels", "text_labels", "external_labels"):
        arrays[name] = arrays[name][:rows]
    return arrays


@pytest.mark.accelerator
@pytest.mark.core
@pytest.mark.parametrize("side", ["img2text", "text2img"])
@pytest.mark.parametrize("translated", ["pbt", "nopbt"])
@pytest.mark.parametrize("target", TEMPERATURES)
def test_golden_sides(inputs, target, translated, side):
    student, teacher = ("image", "text") if side == "img2text" else ("text", "image")
    short = {"image": "img", "text": "text"}
    back = f"pbt_centroids_{short[student]}_from_{short[teacher]}"
    check_golden(
        f"proto/{target}/{translated}/{side}/",
        inputs[f"{student}_projected"],
        inputs[back if translated == "pbt" else f"{teacher}_centroids"],
        inputs[f"{teacher}_centroids"],
        inputs[f"{teacher}_labels"],
        TEMPERATURES[target],
        inputs["logit_scale_proto_param"],
    )


@pytest.mark.accelerator
@pytest.mark.core
@pytest.mark.parametrize("side", ["img2ext", "text2ext"])
def test_golden_external(inputs, side):
    student = "image" if side == "img2ext" else "text"
    check_golden(
        f"external/{side}/",
        inputs[f"{student}_projected"],
        inputs[f"pbt_centroids_{side[:-4]}_from_ext"],
        None,
        inputs["external_labels"],
        None,
        inputs["logit_scale_proto_param"],
    )


@pytest.mark.accelerator
@pytest.mark.core
@pytest.mark.parametrize(
    ("case", "temperature"),
    [
        ("zero_centroids_soft", 0.01),
        ("zero_centroids_hard", None),
        ("zero_feature_T0.01", 0.01),
        ("label_of_empty_cluster_hard", None),
        ("label_of_empty_cluster_T0.01", 0.01),
        ("hard_label_minus1_ignored", None),
    ],
)
def test_golden_degenerate(inputs, case, temperature):
    features = inputs["image_projected"].copy()
    student, teacher = inputs["pbt_centroids_img_from_text"], inputs["text_centroids"]
    labels, scale = inputs["text_labels"], inputs["logit_scale_proto_param"]
    if case.startswith("zero_centroids"):
        student, teacher, labels = 0 * student, 0 * teacher, 0 * labels
    if case.startswith("zero_feature"):
        features[0] = 0
        scale = np.array(np.log(100), np.float32)
    if case.startswith("label_of_empty"):
        labels = inputs["labels_with_empty"]
    if case.startswith("hard_label_minus1"):
        labels = inputs["labels_with_minus1"]
    check_golden(f"degenerate/{case}/", features, student, teacher, labels, temperature, scale)


@pytest.fixture(scope="module")
def crowd():
    """24 rows, 10 prototypes of which three have no members; rows 3 and 7 do not count."""
    rng = np.random.default_rng(5)

    def unit(rows):
        x = rng.normal(size=(rows, 6))
        return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))

    used = np.ones(10, bool)
    used[[0, 4, 9]] = False
    labels = rng.choice(np.flatnonzero(used), size=24).astype(np.int32)
    labels[3], labels[7] = -1, 4
    return {
        "features": unit(24),
        "scale": np.array(np.log(100), np.float32),
        "student": 0.7 * unit(10),
        "teacher": 0.7 * unit(10),
        "labels": labels,
        "used": used,
    }


@pytest.mark.parametrize("temperature", [None, 0.1, 0.01])
def test_unused_prototypes_leave_both_softmaxes(crowd, temperature):
    (loss, accuracy), (grad, _) = loss_and_grads(**crowd, temperature=temperature)
    expected, expected_grad = plain(**crowd, temperature=temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close_to_max(grad, expected_grad, 1e-5)
    kept = np.flatnonzero(crowd["used"])
    best = kept[np.argmax(crowd["features"] @ crowd["student"][kept].T, axis=1)]
    np.testing.assert_allclose(accuracy, 100 * np.mean(best == crowd["labels"]), rtol=1e-6)
    np.testing.assert_array_equal(grad[3], 0)
    np.testing.assert_array_equal(grad[7], 0)


@pytest.mark.parametrize("temperature", [None, 0.01])
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_content_of_unused_prototypes_does_not_matter(crowd, temperature, junk):
    clean = loss_and_grads(**crowd, temperature=temperature)
    dirty = dict(crowd)
    for name in ("student", "teacher"):
        dirty[name] = np.where(crowd["used"][:, None], crowd[name], np.float32(junk))
    jax.tree.map(
        np.testing.assert_array_equal, loss_and_grads(**dirty, temperature=temperature), clean
    )


@pytest.mark.parametrize("temperature", [None, 0.01])
@pytest.mark.parametrize("why", ["no used prototype", "no labelled row", "labels too large"])
def test_nothing_left_is_zero_without_gradient(crowd, temperature, why, mesh):
    crowd = dict(crowd)
    if why == "no used prototype":
        crowd["used"] = np.zeros_like(crowd["used"])
    else:
        value = -1 if why == "no labelled row" else len(crowd["used"])
        crowd["labels"] = np.full_like(crowd["labels"], value)
    for where in (None, mesh):
        for leaf in jax.tree.leaves(loss_and_grads(**crowd, temperature=temperature, mesh=where)):
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("temperature", [None, 0.01])
def test_equal_on_one_and_eight_devices(crowd, temperature, masked, mesh):
    crowd = crowd | {"used": crowd["used"] if masked else None}
    one = loss_and_grads(**crowd, temperature=temperature)
    eight = loss_and_grads(**crowd, temperature=temperature, mesh=mesh)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    for a, b in zip(eight[1], one[1], strict=True):
        assert_close_to_max(a, b, 1e-4)


def test_one_row_left_on_eight_devices(crowd, mesh):
    """The mean is over the rows of all devices, most of which have none to offer."""
    labels = np.full_like(crowd["labels"], -1)
    labels[10] = np.flatnonzero(crowd["used"])[0]
    crowd = crowd | {"labels": labels}
    (loss, accuracy), (grad, _) = loss_and_grads(**crowd, temperature=0.1, mesh=mesh)
    expected, expected_grad = plain(**crowd, temperature=0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close_to_max(grad, expected_grad, 1e-4)
    one = loss_and_grads(**crowd, temperature=0.1)
    np.testing.assert_array_equal(accuracy, one[0][1])


def test_teacher_and_prototypes_have_no_gradient(crowd):
    def loss(student, teacher):
        rest = (crowd["labels"], crowd["used"], 0.1)
        return prototype_loss(crowd["features"], crowd["scale"], student, teacher, *rest)[0]

    for grad in jax.grad(loss, argnums=(0, 1))(crowd["student"], crowd["teacher"]):
        np.testing.assert_array_equal(grad, 0)


def test_devices_hold_local_rows_only(mesh):
    rows, k = 64, 40
    centroids = jnp.ones((k, 4))

    def loss(x):
        labels = jnp.zeros(rows, jnp.int32)
        return prototype_loss(
            x, jnp.float32(0), centroids, centroids, labels, None, 0.1, mesh=mesh
        )[0]

    text = jax.jit(jax.grad(loss)).lower(jnp.ones((rows, 4))).compile().as_text()
    assert f"f32[{rows // mesh.size},{k}]" in text
    assert f"f32[{rows},{k}]" not in text


def test_types(crowd):
    bf16 = {name: jnp.asarray(crowd[name], jnp.bfloat16) for name in ("features", "student")}
    (loss, accuracy), _ = loss_and_grads(**(crowd | bf16), temperature=0.01)
    assert loss.dtype == accuracy.dtype == jnp.float32
    rounded = {name: np.asarray(x, np.float64) for name, x in bf16.items()}
    expected, _ = plain(**(crowd | rounded), temperature=0.01)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    with jax.enable_x64(True):
        wide = {n: np.float64(crowd[n]) for n in ("features", "student", "teacher", "scale")}
        (loss, _), _ = loss_and_grads(**(crowd | wide | {"scale": np.array(2.0)}), temperature=0.1)
        assert loss.dtype == jnp.float64
        expected, _ = plain(**(crowd | wide | {"scale": 2.0}), temperature=0.1)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_every_matmul_asks_for_full_precision(crowd):
    def loss(features):
        return prototype_loss(
            features,
            crowd["scale"],
            crowd["student"],
            crowd["teacher"],
            crowd["labels"],
            crowd["used"],
            0.01,
        )[0]

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.asarray(crowd["features"], jnp.bfloat16)))
    matmuls = jaxpr.count("dot_general[")
    assert matmuls >= 3
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == matmuls


def test_refused(crowd, mesh):
    args = [crowd[n] for n in ("features", "scale", "student", "teacher", "labels", "used")]
    with pytest.raises(ValueError, match=r"temperature is -1, but must be above 0"):
        prototype_loss(*args, -1)
    with pytest.raises(ValueError, match=r"need the teacher's centroids"):
        prototype_loss(*args[:3], None, *args[4:], 0.1)
    with pytest.raises(ValueError, match=r"batch of 20 does not divide over 8 devices"):
        prototype_loss(args[0][:20], *args[1:4], args[4][:20], args[5], None, mesh=mesh)
