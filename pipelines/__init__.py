"""Data: `scan` a folder, then `Loader` reads any step of any epoch of it."""

from typing import TYPE_CHECKING

from pipelines.lazily import names_of

if TYPE_CHECKING:
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

__getattr__ = names_of(
    __name__,
    {
        "cache": ["Cache"],
        "errors": ["UserError"],
        "geometry": ["Augment", "Centre"],
        "labels": ["Csv", "Regex"],
        "loader": ["Batch", "Loader"],
        "manifest": ["Manifest", "Samples"],
        "packing": ["pack"],
        "plan": ["balanced", "subset"],
        "scanning": ["scan"],
        "store": ["Store"],
    },
)
