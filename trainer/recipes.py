"""Settings for what people want of a training, each a command to copy.

    from trainer import fine_tune
    from trainer.recipes import RECIPES

    fine_tune(RECIPES["detail"].config(data="photographs"))

What each of them costs and brings is measured by `onewarp bench recipes`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from pipelines.geometry import Augment
from trainer.config import TrainConfig, flags


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to set, and for what."""

    wish: str
    """What it is for, as a sentence."""
    settings: dict[str, Any]
    """What differs from the defaults, by the names of `TrainConfig`."""

    def config(self, **more: Any) -> TrainConfig:
        """The settings, and others beside or in place of them."""
        return TrainConfig(**self.settings | more)

    def command(self, data: str) -> str:
        """The command line for the folder `data`."""
        return shlex.join(["onewarp", "train", *flags(self.config(data=data).as_dict())])


RECIPES = {
    "look": Recipe(
        wish="See in a minute or two whether data and labels are what they should be.",
        settings={"subset": 0.25, "size": 128, "epochs": 1, "lr_find_steps": 20},
    ),
    "default": Recipe(
        wish="A good classifier of photographs.",
        settings={},
    ),
    "head": Recipe(
        wish="The body stays as it was published: few images, or a body that others share.",
        settings={"epochs": 0, "freeze_epochs": 4},
    ),
    "detail": Recipe(
        wish="Classes that differ in texture and small parts.",
        settings={"size": 224, "quality": "high"},
    ),
    "progressive": Recipe(
        wish="Nearly the same detail in less time: most epochs on smaller images.",
        settings={"sizes": "128:1,160:1,224:1"},
    ),
    "long": Recipe(
        wish="Many epochs on few images, without learning them by heart; each file is decoded once.",
        settings={"epochs": 10, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "cache": "decoded"},
    ),
    "rare": Recipe(
        wish="Classes of which some are rare.",
        settings={"sampling": "balanced", "loss": "focal"},
    ),
    "decline": Recipe(
        wish="`predict` may say that an image is none of the classes.",
        settings={"loss": "one-vs-rest"},
    ),
    "memory": Recipe(
        wish="The same steps in a quarter of the memory, on two workers.",
        settings={"micro_batch": 8},
    ),
    "scratch": Recipe(
        wish="No published weights: images unlike photographs.",
        settings={
            "pretrained": False,
            "schedule": "one-cycle",
            "epochs": 20,
            "size": 96,
            "batch": 32,
            "augment": Augment(crop="resized"),
        },
    ),
}
