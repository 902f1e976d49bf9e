"""What somebody meant: by meaning, in the section that was named first."""

import pytest

from protoclip_jax.recipe import option_types
from protoclip_jax.suggestions import nearest, no_such_option, no_such_word

OPTIONS = [path for path, _, _ in option_types()]
FLAGS = ["config", "workdir", "profile", "dry_run", "num_processes"]


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("optimizer.text_lr", "optimizer.text_learning_rate"),
        ("optimizer.lr_text", "optimizer.text_learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("optimizer.batch_size", "optimizer.batch"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("optimizer.beta_1", "optimizer.beta1"),
        ("optimizer.eps", "optimizer.epsilon"),
        ("optimizer.gradient_clipping", "optimizer.clip_norm"),
        ("optimizer.grad_accumulation", "optimizer.accumulate"),
        ("optim.learningrate", "optimizer.learning_rate"),
        ("optimiser.batch", "optimizer.batch"),
        ("episode.epochs", "episode.count"),
        ("episode.num_prototypes", "episode.prototypes"),
        ("episode.clusters", "episode.prototypes"),
        ("episode.k", "episode.prototypes"),
        ("kmeans.niter", "episode.iterations"),
        ("data.num_workers", "data.workers"),
        ("data.delimiter", "data.separator"),
        ("data.path", "data.train"),
        ("data.caption", "data.caption_column"),
        ("eval.freq", "evaluation.every"),
        ("log.interval", "log.every"),
        ("checkpoint.frequency", "checkpoint.every"),
        ("ckpt.keep_best", "checkpoint.keep"),
        ("model.arch", "model.name"),
        ("model.precision", "model.dtype"),
        ("model.remat", "model.rematerialise"),
        ("model.hidden", "model.projection_hidden"),
        ("log.wandb", "log.wandb_project"),
        ("objective.tau", "objective.temperature"),
        ("lr", "optimizer.learning_rate"),
        ("config.optimizer.lr", "optimizer.learning_rate"),
        ("Optimizer.Batch", "optimizer.batch"),
        ("warmup-steps", "optimizer.warmup_steps"),
        ("optimizer_batch", "optimizer.batch"),
        # Another section has the very name, and the one that was named nothing like it.
        ("optimizer.weights", "model.weights"),
        ("episode.seed", "seed"),
        ("evaluation.batch", "optimizer.batch"),
        ("data.size", "episode.size"),
    ],
)
def test_meaning_decides_within_the_section(path, first):
    assert nearest(path.removeprefix("config."), OPTIONS)[0] == first


def test_several_that_fit_equally_are_all_named():
    assert nearest("log.keep", OPTIONS) == ["data.keep", "checkpoint.keep"]
    assert set(nearest("episode.every", OPTIONS)) == {
        "evaluation.every", "checkpoint.every", "log.every"
    }  # fmt: skip
    assert no_such_option("log.keep", OPTIONS).endswith(
        "did you mean config.data.keep or config.checkpoint.keep?"
    )


@pytest.mark.parametrize("path", ["xyzzy", "data.xyzzy", "", ".", "...", "_", "data.", "-", "="])
def test_nothing_near_gives_no_suggestion(path):
    assert nearest(path, OPTIONS) == []
    assert "did you mean" not in no_such_option(path, OPTIONS)


def test_every_option_is_found_with_a_letter_missing():
    for option in OPTIONS:
        section, dot, name = option.rpartition(".")
        if len(name) > 3 and dot:
            found = nearest(f"{section}.{name[:2]}{name[3:]}", OPTIONS)
            assert option in found, (option, found)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("—config.optimizer.batch=3", "write --config.optimizer.batch=3"),
        ("\u2013config.seed=3", "write --config.seed=3"),
        ("-\u2013config.seed=3", "write --config.seed=3"),
        ("\u2212config.seed=3", "write --config.seed=3"),
        ("-config.seed=3", "write --config.seed=3"),
        ("config.seed=3", "write --config.seed=3"),
        ("--optimizer.batch=3", "write --config.optimizer.batch=3"),
        ("optimizer.batch=3", "write --config.optimizer.batch=3"),
        ("optimizer.batch", "write --config.optimizer.batch=VALUE"),
        ("--data.train=a=b", "write --config.data.train=a=b"),
        ("—workdir=x", "write --workdir=x"),
        ("workdir=x", "write --workdir=x"),
        ("--wokrdir=x", "did you mean --workdir=x?"),
        ("--dry-run", "did you mean --dry_run?"),
        ("--lr=3", "did you mean --config.optimizer.learning_rate=3?"),
        ("--optimizer.lr=3", "did you mean --config.optimizer.learning_rate=3?"),
        ("hello", "options are --NAME=VALUE and --config.SECTION.NAME=VALUE"),
        ("3", "options are --NAME=VALUE"),
        ("—", "options are --NAME=VALUE"),
    ],
)
def test_word_that_is_no_option(word, hint):
    message = no_such_word(word, OPTIONS, FLAGS)
    assert message.startswith(f"{word} is no option: ")
    assert hint in message
