"""An exponential moving average of the weights, to be judged and kept in place of the last ones."""

from __future__ import annotations

from typing import Any

from timm.utils import ModelEmaV3

from trainer.models import Classifier


class Ema:
    """timm's average of a model over its updates, with timm's warm-up.

    After update n the average is decay_n * average + (1 - decay_n) * model, decay_n = min(decay, 1 - n^(-2/3)): the
    first update copies the model, and early weights are soon forgotten, so that short trainings gain too.

    Batch-norm's running statistics are averaged like weights: those of the averaged model lag behind the training's as
    far as its weights do. The averaging is linear, so where ranks hold statistics of their own the mean of their
    averages is the average of their mean: `optim.average_batch_statistics(ema.model, ranks)` before it is judged.

    Args:
        model: what is averaged, as it is on its device, not behind DDP.
        decay: 0.999 looks back over about a thousand updates; between 0 and 1.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self._average = ModelEmaV3(model, decay=decay, use_warmup=True)
        self.updates = 0
        """How often the model was averaged in."""

    @property
    def model(self) -> Classifier:
        """The averaged model, in evaluation mode."""
        return self._average.module

    def update(self, model: Classifier) -> None:
        """Average in the model after an optimiser step that happened: not after one that the loss scaler skipped."""
        self.updates += 1
        self._average.update(model, step=self.updates)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from, to the bit."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
