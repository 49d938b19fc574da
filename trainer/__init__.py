"""Learning: `fine_tune`, `lr_find` and their configuration, the same words as on the command line."""

from pipelines.errors import UserError
from trainer.config import TrainConfig
from trainer.job import LrFind, Result, fine_tune, lr_find

__all__ = ["LrFind", "Result", "TrainConfig", "UserError", "fine_tune", "lr_find"]
