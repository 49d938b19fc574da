"""The model that a benchmark begins with."""

from __future__ import annotations

from trainer import models, weights


def first_model(name: str, *, head: str, classes: int, size: int) -> models.Classifier:
    """A body with its installed weights, where it has some, and a new head."""
    model = models.build(name, head=head, classes=classes, size=size)
    weights.load(model, name, size=size, pretrained=weights.packaged(name) is not None, weights=None)
    return model
