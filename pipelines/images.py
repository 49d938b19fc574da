"""Where the images of a set are: in files, in a store, or in files and in the cache that fills from them."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

from pipelines import graph
from pipelines.cache import Cache
from pipelines.decode import DecodeError, Decoder, decoded
from pipelines.errors import UserError
from pipelines.manifest import Samples
from pipelines.standin import Watch
from pipelines.store import Store


class Images(Protocol):
    """The images of a set, as the graph of this kind takes them."""

    kind: graph.Kind

    def of(self, positions_N: np.ndarray, rows_N2: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """`images` and `paths` of a `GraphInput`, for the samples at these positions, of which these rows are read."""
        ...

    def keep(self, positions_N: np.ndarray, images: list[np.ndarray], whole: Any) -> None:
        """Take what a mixed graph has decoded: what `of` gave for a batch, and DALI's list of whole images."""
        ...

    def explain(self, images: list[np.ndarray]) -> None:
        """Raise UserError where the failure of a batch, for which `of` gave these, can only mean one thing."""
        ...


def images_of(samples: Samples, watch: Watch, cache: Cache | None) -> Images:
    """The images of `samples`; a cache is of no use to a store, which has them in memory already."""
    if samples.store is not None:
        return _Stored(samples)
    return _Files(watch) if cache is None else _Cached(samples, watch, cache)


def pixels_of(samples: Samples, position: int) -> np.ndarray:
    """The image of a sample as the warp reads it on a CPU, uint8 [H, W, 3].

    Raises:
        DecodeError: DALI cannot decode it.
    """
    if samples.store is None:
        return decoded(os.path.join(samples.root, samples.paths[position]))
    store, id = Store.open(samples.store), int(samples.ids_N[position])
    return store.pixels(id) if store.kind == "decoded" else Decoder(1, 1).run([store.encoded(id).tobytes()])[0]


class _Files:
    kind: graph.Kind = "files"

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def of(self, positions_N: np.ndarray, rows_N2: np.ndarray) -> tuple[list[np.ndarray], None]:
        return _paths(self._watch, positions_N), None

    def keep(self, positions_N: np.ndarray, images: list[np.ndarray], whole: Any) -> None: ...

    def explain(self, images: list[np.ndarray]) -> None: ...


class _Stored:
    def __init__(self, samples: Samples) -> None:
        assert samples.store is not None
        self._ids_N = samples.ids_N
        self._store = Store.open(samples.store)
        self.kind: graph.Kind = self._store.kind

    def of(self, positions_N: np.ndarray, rows_N2: np.ndarray) -> tuple[list[np.ndarray], None]:
        ids_N = self._ids_N[positions_N].tolist()
        if self.kind == "encoded":
            return [self._store.encoded(id) for id in ids_N], None
        spans = rows_N2.tolist()
        return [self._store.pixels(id)[first:stop] for id, (first, stop) in zip(ids_N, spans, strict=True)], None

    def keep(self, positions_N: np.ndarray, images: list[np.ndarray], whole: Any) -> None: ...

    def explain(self, images: list[np.ndarray]) -> None:
        for image in images if self.kind == "encoded" else ():
            try:
                Decoder(1, 1).run([image.tobytes()])
            except DecodeError:
                raise UserError(
                    f"The store {str(self._store.folder)!r} holds an image that cannot be decoded any more: its files "
                    "have been damaged since it was written. Pack the images again, to another folder."
                ) from None


class _Cached:
    kind: graph.Kind = "mixed"

    def __init__(self, samples: Samples, watch: Watch, cache: Cache) -> None:
        self._samples, self._watch, self._cache = samples, watch, cache

    def of(self, positions_N: np.ndarray, rows_N2: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        found = [self._cache.get(id) for id in self._samples.ids_N[positions_N].tolist()]
        spans = rows_N2.tolist()
        images = [
            graph.NOT_STORED if pixels is None else pixels[first:stop]
            for pixels, (first, stop) in zip(found, spans, strict=True)
        ]
        return images, _paths(self._watch, positions_N)

    def keep(self, positions_N: np.ndarray, images: list[np.ndarray], whole: Any) -> None:
        for i, (position, image) in enumerate(zip(positions_N.tolist(), images, strict=True)):
            id = int(self._samples.ids_N[position])
            if image is graph.NOT_STORED and self._cache.wants(id):
                pixels_HWC = np.asarray(whole[i])
                # A file that has changed since it was looked at is found when it comes up again.
                if pixels_HWC.shape[:2] == (self._samples.heights_N[position], self._samples.widths_N[position]):
                    self._cache.put(id, pixels_HWC)

    def explain(self, images: list[np.ndarray]) -> None: ...


def _paths(watch: Watch, positions_N: np.ndarray) -> list[np.ndarray]:
    return [np.frombuffer(watch.file(position), np.uint8) for position in positions_N.tolist()]
