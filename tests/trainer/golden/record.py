"""Record what fastai computes, for the tests to compare with; they themselves run without fastai.

Recorded with fastai 2.8.12, torch 2.14.1, torchvision 0.29.1, scikit-learn's digits as real data, on a CPU:

    pip install 'fastai==2.8.*' scikit-learn
    python tests/trainer/golden/record.py

writes suggestions.json, schedules.json, groups.json and unfreezing.json beside this file. Whether a range test's curve
"says nothing" is no judgement of fastai's, which gives a number or an IndexError: it is written down here by hand.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from fastai.callback import schedule
from fastai.callback.core import Callback
from fastai.callback.schedule import minimum, slide, steep, valley
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from fastai.vision.learner import create_vision_model, default_split, model_meta
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import resnet18, resnet34

HERE = Path(__file__).parent
LOW, HIGH = 1e-5, 10.0


def short(value: float) -> float:
    """The shortest decimal that is the same float32; a NaN becomes null, which JSON has."""
    return None if np.isnan(value) else float(str(np.float32(value)))


# Range test


def position(steps: int, taken: int | None = None) -> np.ndarray:
    """log10 of the rate at each of the steps taken."""
    return np.log10(LOW) + np.log10(HIGH / LOW) * np.arange(taken or steps) / steps


def bowl(x: np.ndarray, at: float = -2.5, depth: float = 1.2, rise: float = 0.2) -> np.ndarray:
    """A loss that falls around 10^at and rises steeply past 10^rise."""
    return 2.0 - depth / (1 + np.exp(-3 * (x - at))) + np.exp(4 * (x - rise))


def smooth(losses: np.ndarray) -> np.ndarray:
    """fastai's recorder: the bias-corrected exponential average with beta 0.98."""
    average, smoothed = 0.0, []
    for i, loss in enumerate(losses):
        average = 0.98 * average + 0.02 * loss
        smoothed.append(average / (1 - 0.98 ** (i + 1)))
    return np.array(smoothed)


def generated() -> list[tuple[str, int, np.ndarray, bool]]:
    """(name, steps of the test, losses of the steps taken, whether the curve says nothing)."""
    rng = np.random.default_rng(0)
    noise = partial(rng.normal, 0.0)
    x = position(100)
    spike = bowl(x)
    spike[30] = 0.1
    nan_late, nan_first = bowl(x), np.full(100, np.nan)
    nan_late[60:] = np.nan
    return [
        ("bowl", 100, bowl(x), False),
        ("bowl in 50 steps", 50, bowl(position(50)), False),
        ("bowl in 37 steps", 37, bowl(position(37)), False),
        ("bowl in 24 steps", 24, bowl(position(24)), False),
        ("a little noise", 100, bowl(x) + noise(0.02, 100), False),
        ("much noise", 100, bowl(x) + noise(0.3, 100), False),
        ("noise, smoothed", 100, smooth(bowl(x) + noise(0.5, 100)), False),
        ("noise in 60 steps", 60, bowl(position(60)) + noise(0.1, 60), False),
        ("two valleys", 100, bowl(x, at=-3.5) + 0.5 * np.exp(-4 * (x + 1.5) ** 2), False),
        ("one low point", 100, spike, False),
        ("falls to the end", 100, 3.0 - 0.07 * (x + 5) ** 2, False),
        ("diverges late, cut off", 100, bowl(x, rise=-0.5)[:78], False),
        ("diverges early, cut off", 100, bowl(position(100, 24), at=-4.2, rise=-3.0), False),
        ("diverges at once", 100, 2.0 * 1.3 ** np.arange(14), True),
        ("flat", 100, np.full(100, 2.3), True),
        ("flat with noise", 100, 2.3 + noise(0.004, 100), True),
        ("rises", 100, np.linspace(2.0, 7.0, 100), True),
        ("no number from step 60", 100, nan_late, False),
        ("no number at all", 100, nan_first, True),
    ]


def suggested(lrs: list[float], losses: list[float], steps: int) -> dict[str, float | str]:
    """What `Learner.lr_find` suggests on a recorder with this curve: its own trimming, its own functions."""
    recorder = SimpleNamespace(lrs=lrs, losses=[torch.tensor(loss, dtype=torch.float32) for loss in losses])
    learner = SimpleNamespace(
        dls=SimpleNamespace(train=[None]),
        no_logging=contextlib.nullcontext,
        fit=lambda *arguments, **options: None,
        recorder=recorder,
    )
    found: dict[str, float | str] = {}
    for function in (valley, slide, minimum, steep):
        try:
            (rate,) = Learner.lr_find(learner, num_it=steps, show_plot=False, suggest_funcs=function)
            found[function.__name__] = float(rate)
        except (IndexError, ValueError, RuntimeError) as error:
            found[function.__name__] = type(error).__name__
    return found


def digits(batch: int) -> DataLoaders:
    data = load_digits()
    images_N18x8 = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    items = list(zip(images_N18x8, torch.tensor(data.target), strict=True))
    return DataLoaders(*(DataLoader(items, bs=batch, shuffle=False, drop_last=True) for _ in range(2)))


def real() -> list[tuple[str, int, Learner, bool]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    loss, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    return [
        ("digits, perceptron, Adam", 100, Learner(digits(64), mlp, loss_func=loss, opt_func=Adam), False),
        ("digits, convolutions, batches of 16, Adam", 100, Learner(digits(16), cnn, loss_func=loss), False),
        ("digits, convolutions, 50 steps, SGD", 50, Learner(digits(64), cnn, loss_func=loss, opt_func=SGD), False),
        ("digits, a sum for a loss, SGD", 100, Learner(digits(64), mlp, loss_func=total, opt_func=SGD), False),
    ]


def record_suggestions() -> list[dict]:
    rows = []
    for name, steps, losses_M, says_nothing in generated():
        losses = [float(np.float32(loss)) for loss in losses_M]
        rows.append((name, steps, LOW, losses, says_nothing))
    for name, steps, learner, says_nothing in real():
        with tempfile.TemporaryDirectory() as folder, learner.no_bar():
            learner.path = Path(folder)
            learner.lr_find(num_it=steps, show_plot=False)
        rows.append((name, steps, 1e-7, [float(loss) for loss in learner.recorder.losses], says_nothing))
    found = []
    for name, steps, low, losses, says_nothing in rows:
        lrs = [low * (HIGH / low) ** (i / steps) for i in range(len(losses))]
        found.append(
            {
                "name": name,
                "steps": steps,
                "low": low,
                "high": HIGH,
                "losses": [short(loss) for loss in losses],
                "says_nothing": says_nothing,
                "fastai": suggested(lrs, losses, steps),
            }
        )
    return found


# Schedules and freezing


class Spy(Callback):
    """Rate of every group, and momentum, as the optimiser is about to step."""

    def before_fit(self) -> None:
        self.lrs: list[list[float]] = []
        self.momentum: list[float] = []

    def before_step(self) -> None:
        self.lrs.append([float(hyper["lr"]) for hyper in self.opt.hypers])
        self.momentum.append(float(self.opt.hypers[-1]["mom"]))


def three_groups() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10), nn.BatchNorm1d(10)),
    )


def split(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(part.parameters()) for part in model]


def tiny(**options: object) -> Learner:
    items = [(torch.zeros(1, 8, 8), torch.tensor(0))] * 14
    loaders = DataLoaders(*(DataLoader(items, bs=2) for _ in range(2)))
    return Learner(loaders, three_groups(), loss_func=nn.CrossEntropyLoss(), splitter=split, **options)


def record_schedules() -> dict:
    calls = {
        "fine_tune(2)": lambda learner, spy: learner.fine_tune(2, cbs=spy),
        "fit_one_cycle(12, slice(1e-6, 1e-4))": lambda learner, spy: learner.fit_one_cycle(
            12, slice(1e-6, 1e-4), cbs=spy
        ),
        "fit_one_cycle(2, 3e-3)": lambda learner, spy: learner.fit_one_cycle(2, 3e-3, cbs=spy),
        "fit_flat_cos(4, slice(1e-3))": lambda learner, spy: learner.fit_flat_cos(4, slice(1e-3), cbs=spy),
    }
    return {"steps_per_epoch": 7, "groups": 3, **{name: fit(call) for name, call in calls.items()}}


def fit(call) -> dict:
    """lr [steps][groups] and momentum [steps] over all phases of a call."""

    class Spies(Spy):
        def before_fit(self) -> None:  # `fine_tune` fits twice
            if not hasattr(self, "lrs"):
                super().before_fit()

    learner, spy = tiny(), Spies()
    with learner.no_logging(), learner.no_bar():
        call(learner, spy)
    return {"lr": spy.lrs, "momentum": spy.momentum}


def record_unfreezing() -> dict:
    """Weights before and after `fine_tune(1, base_lr=0.02)` of three linear layers, a group each, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).double()
    images_N4, labels_N = torch.randn(14, 4, dtype=torch.float64), torch.randint(0, 2, (14,))
    items = list(zip(images_N4, labels_N, strict=True))
    loaders = DataLoaders(*(DataLoader(items, bs=2) for _ in range(2)))
    loss = nn.CrossEntropyLoss()
    # The recorder can show no loss in float64; the gradients stay in it.
    learner = Learner(loaders, model, loss_func=lambda logits, labels: loss(logits, labels).float(), splitter=split)
    found = {"images_N4": images_N4.tolist(), "labels_N": labels_N.tolist(), "before": weights(model)}
    with learner.no_logging(), learner.no_bar():
        learner.fine_tune(1, base_lr=0.02)
    return {**found, "after": weights(model)}


def weights(model: nn.Module) -> list:
    return [parameter.tolist() for parameter in model.parameters()]


def double_precision() -> None:
    """fastai computes the place in a cycle in float32 (`combine_scheds`); here in the float64 of the rates."""
    schedule.tensor = lambda values: torch.tensor([float(value) for value in values], dtype=torch.float64)


def record_groups() -> dict:
    found: dict = {"learning": {}, "resnet": {}}
    for train_bn in (True, False):
        for n in (-1, -2, 0, 1, 2, 3):
            learner = tiny(train_bn=train_bn)
            learner.freeze_to(n)
            found["learning"][f"freeze_to({n}), train_bn={train_bn}"] = [
                name for name, parameter in learner.model.named_parameters() if parameter.requires_grad
            ]
    for body in (resnet18, resnet34):
        model = create_vision_model(body, 5, pretrained=False)
        groups = model_meta.get(body, {"split": default_split})["split"](model)
        learner = Learner(digits(64), model, loss_func=nn.CrossEntropyLoss(), splitter=lambda _, g=groups: g)
        learner.create_opt()
        plain = {id(p) for p, *_, state, _ in learner.opt.all_params() if not state.get("do_wd", True)}
        found["resnet"][body.__name__] = {
            "groups": [[list(p.shape) for p in group] for group in groups],
            "decayed": [[id(p) not in plain for p in group] for group in groups],
        }
    return found


def write(name: str, values: object) -> None:
    text = json.dumps(values, separators=(",", ":"))
    (HERE / f"{name}.json").write_text(text.replace('},{"name"', '},\n{"name"') + "\n")


if __name__ == "__main__":
    write("suggestions", record_suggestions())
    write("groups", record_groups())
    shipped = record_schedules()
    double_precision()
    write("schedules", {"float32": shipped, "float64": record_schedules()})
    write("unfreezing", record_unfreezing())
