import numpy as np
import pytest
from golden_files import golden, golden_json
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from protoclip_jax.evaluation.linear_probe import (
    Standardiser,
    accuracy,
    chance,
    linear_probe,
    logistic_regression,
    split_rows,
)


def blobs(rows, classes=4, width=6, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, rows)
    return (centres[labels] + spread * rng.normal(size=(rows, width))).astype(np.float32), labels


@pytest.mark.core
@pytest.mark.parametrize("C", ["0.316", "3.16"])
def test_golden_logistic_regression(C):
    data, expected = golden("evaluation", "linear/"), golden_json("evaluation")
    found = logistic_regression(data["train_x"], data["train_y"], float(C))
    np.testing.assert_allclose(found.weights, data[f"sklearn_C{C}/coef"], atol=1e-3)
    np.testing.assert_allclose(found.bias, data[f"sklearn_C{C}/intercept"], atol=1e-3)
    scores = data["test_x"] @ found.weights.T + found.bias
    np.testing.assert_allclose(softmax(scores, axis=1), data[f"sklearn_C{C}/test_probs"], atol=1e-3)
    wanted = expected[f"linear_sklearn_C{C}"]
    test = accuracy(found, data["test_x"], data["test_y"])
    assert test == pytest.approx(wanted["test_accuracy"], abs=0.2)
    train = accuracy(found, data["train_x"], data["train_y"])
    assert train == pytest.approx(wanted["train_accuracy"], abs=0.2)


@pytest.mark.core
def test_golden_accuracy_at_the_loose_tolerance_of_the_search():
    data, expected = golden("evaluation", "linear/"), golden_json("evaluation")
    found = logistic_regression(data["train_x"], data["train_y"], 0.316, tolerance=0.02)
    wanted = expected["linear_sklearn_reference_defaults_C0.316"]["test_accuracy"]
    assert accuracy(found, data["test_x"], data["test_y"]) == pytest.approx(wanted, abs=0.2)


def test_gradient_is_zero_at_the_answer():
    features, labels = blobs(300)
    C = 0.7
    found = logistic_regression(features, labels, C)
    error = softmax(features @ found.weights.T + found.bias, axis=1) - np.eye(4)[labels]
    np.testing.assert_allclose(C * error.T @ features + found.weights, 0, atol=1e-4)
    np.testing.assert_allclose(C * error.sum(axis=0), 0, atol=1e-4)


def test_two_classes_and_a_class_without_rows():
    features, labels = blobs(200, classes=2)
    two = logistic_regression(features, labels, 1.0)
    assert two.weights.shape == (2, 6)
    wide = logistic_regression(features, 3 * labels, 1.0, num_classes=5)
    scores = features @ wide.weights.T + wide.bias
    assert set(scores.argmax(axis=1)) == {0, 3}
    assert accuracy(two, features, labels) == accuracy(wide, features, 3 * labels)
    with pytest.raises(ValueError, match="found 1 class"):
        logistic_regression(features, 0 * labels, 1.0)


def test_equals_scikit_learn():
    features, labels = blobs(120, spread=2.0)
    features = features.astype(np.float64)  # scikit-learn fits float32 in float32
    for C in (0.01, 30.0):
        plain = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(features, labels)
        found = logistic_regression(features, labels, C)
        scale = np.abs(plain.coef_).max()
        np.testing.assert_allclose(found.weights, plain.coef_, atol=1e-5 * scale)
        np.testing.assert_allclose(found.bias, plain.intercept_, atol=1e-5 * scale)


def test_start_changes_nothing_but_the_time():
    features, labels = blobs(200)
    cold = logistic_regression(features, labels, 2.0)
    warm = logistic_regression(
        features, labels, 2.0, start=logistic_regression(features, labels, 0.1)
    )
    np.testing.assert_allclose(warm.weights, cold.weights, atol=1e-4)
    np.testing.assert_allclose(warm.bias, cold.bias, atol=1e-4)


def test_nearly_equal_features_are_told_apart():
    # An untrained model's features: one direction with a whisper of information.
    features, labels = blobs(400, spread=0.3)
    features = np.float32([1, 0, 0, 0, 0, 0]) + 1e-3 * features
    assert linear_probe(features, labels, features, labels).top1 > 95


def test_regularisation_is_chosen_by_the_held_out_rows():
    train, test = blobs(400, spread=1.5), blobs(300, seed=1, spread=1.5)
    result = linear_probe(*train, *test, tolerance=1e-4)
    best = max(result.held_out_top1.values())
    chosen = result.regularisation
    assert chosen == min(C for C, score in result.held_out_top1.items() if score == best)
    assert sorted(result.held_out_top1).index(chosen) >= len(result.held_out_top1) - 3
    standard = Standardiser.of(train[0])
    refit = logistic_regression(standard.apply(train[0]), train[1], chosen)
    np.testing.assert_allclose(result.classifier.weights, standard.fold(refit).weights, atol=1e-3)
    assert result.top1 == accuracy(standard.fold(refit), *test)
    rows, held = split_rows(train[1])
    plain = logistic_regression(standard.apply(train[0][rows]), train[1][rows], chosen)
    folded = standard.fold(plain)
    assert result.held_out_top1[chosen] == accuracy(folded, train[0][held], train[1][held])


def test_standardised_features_and_the_folded_classifier():
    features, labels = blobs(50)
    features = (7 + 0.01 * features).astype(np.float64)
    standard = Standardiser.of(features)
    found = standard.apply(features)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-3)
    assert np.mean(found**2) == pytest.approx(1, rel=1e-3)
    assert np.mean((Standardiser.of(features, 5.0).apply(features) ** 2).sum(axis=1)) == (
        pytest.approx(5, rel=1e-3)
    )
    classifier = logistic_regression(found, labels, 1.0)
    folded = standard.fold(classifier)
    np.testing.assert_allclose(
        features @ folded.weights.T + folded.bias,
        found @ classifier.weights.T + classifier.bias, atol=1e-6,
    )  # fmt: skip
    assert Standardiser.of(np.ones((3, 2))).scale == 1.0


def test_split_keeps_every_class_on_both_sides():
    labels = np.array([0] * 50 + [1] * 2 + [2] + [5] * 11)
    rows, held = split_rows(labels, 0.2, seed=3)
    assert sorted([*rows, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=6).tolist() == [10, 1, 0, 0, 0, 2]
    again = split_rows(labels, 0.2, seed=3)
    np.testing.assert_array_equal(held, again[1])
    assert (held[:10] != split_rows(labels, 0.2, seed=4)[1][:10]).any()
    with pytest.raises(ValueError, match="every class has one row"):
        split_rows(np.arange(5))


def test_chance_is_the_commonest_training_class():
    assert chance(np.array([0, 1, 1]), np.array([0, 0, 1, 2])) == 25.0


def test_non_finite_features_are_refused():
    features, labels = blobs(20)
    broken = features.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 20 training features are not finite"):
        linear_probe(broken, labels, features, labels)
    with pytest.raises(ValueError, match="1 of 20 test features are not finite"):
        linear_probe(features, labels, broken, labels)
