"""What is said of a run's epochs, and that it is not said of chance."""

import math

import numpy as np
import pytest

from trainer.overfitting import CHANCE, advice, standard_errors


def curve(errors, *, f1=None, losses=None, images=1000, frozen=1):
    """Events as a journal has them; macro F1 follows the error, and the loss falls, unless they are given."""
    f1 = [1 - error for error in errors] if f1 is None else f1
    losses = [1.0 / (epoch + 1) for epoch in range(len(errors))] if losses is None else losses
    return [
        {
            "epoch": epoch,
            "phase": "frozen" if epoch < frozen else "unfrozen",
            "error_rate": error,
            "macro_f1": score,
            "valid_loss": loss,
            "standard_errors": {
                "error_rate": math.sqrt(error * (1 - error) / images),
                "macro_f1": math.sqrt(error * (1 - error) / images),
                "valid_loss": 1.0 / math.sqrt(images),
            },
        }
        for epoch, (error, score, loss) in enumerate(zip(errors, f1, losses, strict=True))
    ]


def test_a_training_that_gets_better_to_its_end_is_left_alone():
    assert advice(curve([0.3, 0.2, 0.15, 0.1]), 1000) == []
    assert advice(curve([0.3]), 1000) == advice([], 1000) == []


def test_an_error_that_rose_is_overfitting_and_says_how_many_epochs():
    (told,) = advice(curve([0.3, 0.2, 0.1, 0.12, 0.15]), 1000)
    assert told.startswith("Overfitting: the validation error was lowest in epoch 2 (0.1000) and ended at 0.1500")
    assert "--epochs 2:" in told  # epoch 0 had the head alone
    (told,) = advice(curve([0.3, 0.2, 0.1, 0.12, 0.15], frozen=0), 1000)
    assert "--epochs 3:" in told
    (told,) = advice(curve([0.3, 0.2, 0.1, 0.12, 0.15]), 1000, sizes=True)
    assert "--sizes of 2 epochs in all" in told
    (told,) = advice(curve([0.1, 0.2, 0.2]), 1000)
    assert "--epochs 0" in told and "--freeze-epochs 1" in told and "lower --lr" in told


def test_a_rise_within_chance_is_not_called_worse():
    """The same rise, of images few and many: it is the number of them that tells."""
    rise = [0.3, 0.10, 0.12]
    (few,) = advice(curve(rise, images=100), 100)
    assert few.startswith("The validation error was lowest in epoch 1 (0.1000)")
    assert "no worse as far as 100 images can tell" in few
    (many,) = advice(curve(rise, images=10_000), 10_000)
    assert many.startswith("Overfitting:")


@pytest.mark.parametrize(("images", "wrong"), [(1000, 12), (1000, 18)])
def test_where_the_line_is(images, wrong):
    """Two epochs: a rise is beyond chance from 1.28 standard errors on, one side of a normal distribution's tenth."""
    best, last = 0.1, 0.1 + wrong / images
    beyond = last - best > 1.2816 * math.sqrt(last * (1 - last) / images)
    (told,) = advice(curve([best, last]), images)
    assert told.startswith("Overfitting:") == beyond


def test_rare_classes_that_got_worse_are_told_by_macro_f1():
    (told,) = advice(curve([0.3, 0.2, 0.19], f1=[0.6, 0.8, 0.7]), 1000)
    assert told.startswith("Overfitting in some classes: macro F1 was highest in epoch 1 (0.8000) and ended at 0.7000")
    assert "--epochs 1:" in told


def test_a_loss_that_rose_alone_is_over_confidence():
    (told,) = advice(curve([0.3, 0.2, 0.15, 0.12], losses=[0.9, 0.5, 0.6, 0.7]), 1000)
    assert told.startswith("Over-confidence, not overfitting: the validation loss rose from 0.5000 (epoch 1) to 0.7000")
    assert "while the error kept falling (0.2000, then 0.1200)" in told
    assert "fewer epochs would not mend that" in told
    assert "--epochs" not in told
    (told,) = advice(curve([0.3, 0.2, 0.2], losses=[0.9, 0.5, 0.7]), 1000)
    assert "while the error did not get worse" in told
    assert advice(curve([0.3, 0.2, 0.15], losses=[0.9, 0.50, 0.51]), 1000) == []  # within chance
    assert advice(curve([0.3, 0.2, 0.15], losses=[0.9, math.nan, math.nan]), 1000) == []


def test_a_loss_that_rose_together_with_the_error_is_not_excused():
    (told,) = advice(curve([0.3, 0.1, 0.2], losses=[0.9, 0.5, 1.5]), 1000)
    assert told.startswith("Overfitting:")


def verdicts(rng, images, classes):
    """Labels, predictions and losses of a judge that is better at some classes than at others."""
    labels_N = rng.choice(classes, images, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    right_N = rng.random(images) < 0.5 + 0.4 * labels_N / classes
    predicted_N = np.where(right_N, labels_N, rng.integers(0, classes, images))
    return labels_N, predicted_N, rng.exponential(0.5, images)


def test_standard_errors_are_the_scatter_over_other_validation_sets():
    """Against a bootstrap: the same verdicts drawn anew, with torchmetrics' macro F1."""
    from trainer.metrics import summarise

    rng = np.random.default_rng(0)
    labels_N, predicted_N, losses_N = verdicts(rng, 600, 6)
    said = standard_errors(labels_N, predicted_N, losses_N)
    drawn = {name: [] for name in said}
    for _ in range(400):
        again_N = rng.integers(0, 600, 600)
        metrics = summarise(
            labels_N[again_N], predicted_N[again_N], np.full(600, 0.5), np.zeros(600, np.int64), list("abcdef")
        )
        drawn["error_rate"].append(metrics.error_rate)
        drawn["macro_f1"].append(metrics.macro_f1)
        drawn["valid_loss"].append(losses_N[again_N].mean())
    for name, values in drawn.items():
        assert said[name] == pytest.approx(np.std(values), rel=0.15), name


def test_a_perfect_verdict_and_a_class_that_is_not_there():
    labels_N = np.array([0, 2, 2, 0])
    said = standard_errors(labels_N, labels_N.copy(), np.zeros(4))
    assert said == {"error_rate": 0.0, "macro_f1": 0.0, "valid_loss": 0.0}
    # one image more that is wrong is chance, also where none was wrong before
    after = standard_errors(labels_N, np.array([0, 2, 2, 2]), np.zeros(4))
    epochs = curve([0.0, 0.25], f1=[1.0, 11 / 15], losses=[0.5, 0.5], images=4)
    epochs[0]["standard_errors"], epochs[1]["standard_errors"] = said, after
    (told,) = advice(epochs, 4)
    assert "no worse as far as 4 images can tell" in told


def test_of_ten_trainings_that_stay_level_one_at_most_is_called_worse():
    """A judge that does not change: most images are surely right or surely wrong, some are a coin's toss."""
    rng = np.random.default_rng(1)
    told = 0
    for _ in range(400):
        chance_N = rng.beta(0.15, 0.6, 341)  # of being misjudged; a fifth on average
        errors = (rng.random((8, 341)) < chance_N).mean(axis=1).tolist()
        told += any("Overfitting" in words for words in advice(curve(errors, images=341), 341))
    assert 0 < told / 400 <= CHANCE
