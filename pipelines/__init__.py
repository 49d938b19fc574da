"""Data: `scan` a folder, then `Loader` reads any step of any epoch of it."""

from pipelines.cache import Cache
from pipelines.errors import UserError
from pipelines.geometry import Augment, Centre
from pipelines.labels import Csv, Regex
from pipelines.loader import Batch, Loader
from pipelines.manifest import Manifest, Samples
from pipelines.packing import pack
from pipelines.plan import balanced, subset
from pipelines.scanning import scan
from pipelines.store import Store

__all__ = [
    "Augment",
    "Batch",
    "Cache",
    "Centre",
    "Csv",
    "Loader",
    "Manifest",
    "Regex",
    "Samples",
    "Store",
    "UserError",
    "balanced",
    "pack",
    "scan",
    "subset",
]
