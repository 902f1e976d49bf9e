import numpy as np
import pytest
from golden_files import golden, golden_json
from scipy.special import log_softmax, softmax

from protoclip_jax.evaluation import sgd_probe as module
from protoclip_jax.evaluation.linear_probe import accuracy
from protoclip_jax.evaluation.sgd_probe import SGDSettings, sgd_probe, train_sgd


def replay(data, **kwargs):
    epochs = len(data["sgd_train_loss_per_epoch"])
    return train_sgd(
        data["train_x"], data["train_y"], data["sgd_init_weight"],
        settings=SGDSettings(epochs=epochs, shuffle_seed=None),
        monitor_features=data["test_x"], monitor_labels=data["test_y"], **kwargs,
    )  # fmt: skip


@pytest.mark.core
def test_golden_replay():
    data, expected = golden("evaluation", "linear/"), golden_json("evaluation")
    run = replay(data)
    np.testing.assert_allclose(run.classifier.weights, data["sgd_final_weight"], atol=1e-4)
    np.testing.assert_allclose(run.classifier.bias, data["sgd_final_bias"], atol=1e-4)
    np.testing.assert_allclose(run.train_loss, data["sgd_train_loss_per_epoch"], rtol=1e-4)
    wanted = expected["linear_sgd100_replay"]
    assert accuracy(run.classifier, data["test_x"], data["test_y"]) == pytest.approx(
        wanted["final_test_accuracy"], abs=0.2
    )
    assert run.monitor_top1.max() == pytest.approx(wanted["best_test_accuracy"], abs=0.2)
    np.testing.assert_allclose(run.monitor_top1, data["sgd_test_acc_per_epoch"], atol=0.35)


def plain_sgd(features, labels, weights, settings, stop):
    """The same training in plain float64 NumPy, through epoch `stop`."""
    weights, bias = weights.astype(np.float64), np.zeros(len(weights))
    moving = [np.zeros_like(weights), np.zeros_like(bias)]
    losses = []
    for epoch in range(stop + 1):
        rate = settings.learning_rate * (1 + np.cos(np.pi * epoch / settings.epochs)) / 2
        total = 0.0
        for start in range(0, len(labels), settings.batch_size):
            x, y = (a[start : start + settings.batch_size] for a in (features, labels))
            scores = x @ weights.T + bias
            total -= log_softmax(scores, axis=1)[np.arange(len(y)), y].sum()
            error = (softmax(scores, axis=1) - np.eye(len(bias))[y]) / len(y)
            grads = error.T @ x, error.sum(axis=0)
            for i, (grad, value) in enumerate(zip(grads, (weights, bias), strict=True)):
                moving[i] = settings.momentum * moving[i] + grad + settings.weight_decay * value
                value -= rate * moving[i]
        losses.append(total / len(labels))
    return weights, bias, losses


def test_equals_plain_float64_and_keeps_the_epoch_asked_for():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 70)
    features = (np.eye(3, 5)[labels] + 0.5 * rng.normal(size=(70, 5))).astype(np.float32)
    weights = (0.1 * rng.normal(size=(3, 5))).astype(np.float32)
    settings = SGDSettings(epochs=9, weight_decay=1e-2, batch_size=32, shuffle_seed=None)
    run = train_sgd(
        features, labels, weights, settings=settings, keep_epoch=4,
        monitor_features=features, monitor_labels=labels,
    )  # fmt: skip
    plain_weights, plain_bias, _ = plain_sgd(features, labels, weights, settings, stop=4)
    np.testing.assert_allclose(run.classifier.weights, plain_weights, atol=1e-5)
    np.testing.assert_allclose(run.classifier.bias, plain_bias, atol=1e-5)
    losses = plain_sgd(features, labels, weights, settings, stop=8)[2]
    np.testing.assert_allclose(run.train_loss, losses, rtol=1e-5)


def test_shuffling_rescues_rows_sorted_by_class():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 64)
    features = (np.eye(4, 8)[labels] + 0.3 * rng.normal(size=(256, 8))).astype(np.float32)
    start = np.zeros((4, 8), np.float32)
    runs = [
        train_sgd(
            features, labels, start, monitor_features=features, monitor_labels=labels,
            settings=SGDSettings(epochs=2, batch_size=64, shuffle_seed=seed),
        )
        for seed in (None, 0, 1)
    ]  # fmt: skip
    in_order, first, second = (run.monitor_top1[0] for run in runs)
    assert min(first, second) > in_order + 10
    assert (runs[1].classifier.weights != runs[2].classifier.weights).any()


def test_epoch_is_the_best_on_held_out_rows(monkeypatch):
    runs = []

    def noted(*arguments, **options):
        runs.append((train_sgd(*arguments, **options), options))
        return runs[-1][0]

    monkeypatch.setattr(module, "train_sgd", noted)
    rng = np.random.default_rng(2)
    labels, test_labels = rng.integers(0, 3, 90), rng.integers(0, 3, 50)
    features = (np.eye(3, 6)[labels] + rng.normal(size=(90, 6))).astype(np.float32)
    test = (np.eye(3, 6)[test_labels] + rng.normal(size=(50, 6))).astype(np.float32)
    result = sgd_probe(features, labels, test, test_labels, settings=SGDSettings(epochs=20))
    assert result.epoch == result.held_out_top1.argmax()
    assert result.top1 == pytest.approx(accuracy(result.classifier, test, test_labels), abs=1e-4)
    (choosing, _), (final, options) = runs
    np.testing.assert_array_equal(result.held_out_top1, choosing.monitor_top1)
    np.testing.assert_array_equal(options["monitor_labels"], test_labels)
    assert len(options["monitor_features"]) == 50
    assert result.top1 == final.monitor_top1[result.epoch]
    assert result.best_test_top1 == final.monitor_top1.max()


def test_rate_suits_features_of_any_length_and_direction():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 200)
    features = (np.eye(3, 6)[labels] + 0.1 * rng.normal(size=(200, 6))).astype(np.float32)
    features[:, 5] += 5 * rng.normal(size=200)
    settings = SGDSettings(epochs=20, batch_size=64)
    for scale in (1e-3, 1.0, 1e3):
        result = sgd_probe(scale * features, labels, scale * features, labels, settings=settings)
        assert result.top1 > 90


def test_epoch_is_not_chosen_on_test_rows():
    """Right test labels are best after the last epochs, wrong ones after the first."""
    rng = np.random.default_rng(4)
    labels, test_labels = rng.integers(0, 3, 600), rng.integers(0, 3, 300)
    features = (np.eye(3, 6)[labels] + 0.4 * rng.normal(size=(600, 6))).astype(np.float32)
    test = (np.eye(3, 6)[test_labels] + 0.4 * rng.normal(size=(300, 6))).astype(np.float32)
    # So slow that the accuracy rises from epoch to epoch.
    settings = SGDSettings(epochs=8, learning_rate=1e-3)
    right, wrong = (
        sgd_probe(features, labels, test, shown, settings=settings)
        for shown in (test_labels, (test_labels + 1) % 3)
    )
    assert right.epoch == wrong.epoch > 0
    np.testing.assert_array_equal(right.classifier.weights, wrong.classifier.weights)
    assert wrong.top1 + 1 < wrong.best_test_top1
