"""Learning: `fine_tune`, `lr_find`; applying what was learned: `evaluate_run`, `predict`, `export`; and their
configurations.

The settings are the same words as on the command line.
"""

from typing import TYPE_CHECKING

from pipelines.lazily import names_of

if TYPE_CHECKING:
    from pipelines.errors import UserError
    from trainer.apply_config import EvaluateConfig, PredictConfig
    from trainer.checking import ExportCheck, check_export
    from trainer.config import TrainConfig
    from trainer.evaluating import Evaluation, evaluate_run
    from trainer.export_config import CheckExportConfig, ExportConfig
    from trainer.exporting import Export, export
    from trainer.job import LrFind, Result, fine_tune, lr_find
    from trainer.predicting import predict
    from trainer.predictions import Predictions

__all__ = [
    "CheckExportConfig",
    "EvaluateConfig",
    "Evaluation",
    "Export",
    "ExportCheck",
    "ExportConfig",
    "LrFind",
    "PredictConfig",
    "Predictions",
    "Result",
    "TrainConfig",
    "UserError",
    "check_export",
    "evaluate_run",
    "export",
    "fine_tune",
    "lr_find",
    "predict",
]

__getattr__ = names_of(
    __name__,
    {
        "apply_config": ["EvaluateConfig", "PredictConfig"],
        "checking": ["ExportCheck", "check_export"],
        "config": ["TrainConfig", "UserError"],
        "evaluating": ["Evaluation", "evaluate_run"],
        "export_config": ["CheckExportConfig", "ExportConfig"],
        "exporting": ["Export", "export"],
        "job": ["LrFind", "Result", "fine_tune", "lr_find"],
        "predicting": ["predict"],
        "predictions": ["Predictions"],
    },
)
