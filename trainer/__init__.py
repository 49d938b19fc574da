"""Learning: `fine_tune`, `lr_find`; applying what was learned: `evaluate_run`, `predict`; and their configurations.

The settings are the same words as on the command line.
"""

from typing import TYPE_CHECKING

from pipelines.lazily import names_of

if TYPE_CHECKING:
    from pipelines.errors import UserError
    from trainer.apply_config import EvaluateConfig, PredictConfig
    from trainer.config import TrainConfig
    from trainer.evaluating import Evaluation, evaluate_run
    from trainer.job import LrFind, Result, fine_tune, lr_find
    from trainer.predicting import Predictions, predict

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "LrFind",
    "PredictConfig",
    "Predictions",
    "Result",
    "TrainConfig",
    "UserError",
    "evaluate_run",
    "fine_tune",
    "lr_find",
    "predict",
]

__getattr__ = names_of(
    __name__,
    {
        "apply_config": ["EvaluateConfig", "PredictConfig"],
        "config": ["TrainConfig", "UserError"],
        "evaluating": ["Evaluation", "evaluate_run"],
        "job": ["LrFind", "Result", "fine_tune", "lr_find"],
        "predicting": ["Predictions", "predict"],
    },
)
