"""Data: `scan` a folder, then `Loader` reads any step of any epoch of it."""

from pipelines.errors import UserError
from pipelines.geometry import Augment
from pipelines.labels import Csv, Regex
from pipelines.loader import Batch, Loader
from pipelines.manifest import Manifest, Samples
from pipelines.scanning import scan

__all__ = ["Augment", "Batch", "Csv", "Loader", "Manifest", "Regex", "Samples", "UserError", "scan"]
