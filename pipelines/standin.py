"""A file that goes bad after the scan: found when its batch comes up, named, and stood in for by a fixed rule.

The rule: its place is taken by the next image of the same class, in the order of the set and around its end, that
can still be read; where the class has none left, by the next image at all. The stand-in is read with the draw of
the sample it replaces. So what a batch holds depends on the files alone, and every rank, which looks at its own part
of a batch only, keeps its number of steps without asking the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.errors import UserError
from pipelines.firewall import Decoded, Refused, examine
from pipelines.limits import MAX_PIXELS
from pipelines.manifest import Samples

_BLOCK = 64  # candidates looked at together: where a whole folder has gone, one at a time would take hours


@dataclass(frozen=True, kw_only=True)
class Spoiled:
    """A file that could be read when it was scanned, and cannot any more."""

    id: int
    """Row number in the manifest."""
    path: str
    """Relative to the root; names that are not UTF-8 hold surrogate escapes."""
    reason: str


class Watch:
    """Knows which samples of a set have gone bad; learns it from the file system and from the decoder.

    A file whose size and time of modification are those of the scan is trusted. Any other is decoded by itself before
    it may enter a batch, where it could end the whole process: DALI may crash on a file that its parser refuses.
    """

    def __init__(self, samples: Samples, threads: int) -> None:
        self._samples, self._threads = samples, threads
        self._root = os.fsencode(samples.root)
        largest = samples.heights_N.astype(np.int64) * samples.widths_N
        self._max_pixels = max(MAX_PIXELS, int(largest.max(initial=0)))  # what the scan let pass is not too large now
        self._spoiled: dict[int, Spoiled] = {}
        self._touched: dict[int, tuple[int, int]] = {}  # changed on disk and read in full since: bytes, mtime_ns

    @property
    def spoiled(self) -> tuple[Spoiled, ...]:
        """What has been found so far, in the order of finding."""
        return tuple(self._spoiled.values())

    def file(self, position: int) -> bytes:
        """Absolute path of a sample."""
        return self._root + b"/" + os.fsencode(self._samples.paths[position])

    def readable(self, positions_N: np.ndarray) -> np.ndarray:
        """Which of the samples can be read, bool [N]."""
        if self._samples.store is None:
            self._examine([position for position in positions_N.tolist() if self._differs(position)])
        return np.array([position not in self._spoiled for position in positions_N.tolist()], bool)

    def stand_ins(self, positions_N: np.ndarray) -> np.ndarray:
        """The samples to read, int64 [N]: the given ones, but a stand-in for each that cannot be read.

        Raises:
            UserError: no image of the set can be read any more.
        """
        readable_N = self.readable(positions_N)
        if readable_N.all():
            return positions_N
        return np.where(
            readable_N,
            positions_N,
            [
                position if ok else self._next(position)
                for position, ok in zip(positions_N.tolist(), readable_N, strict=True)
            ],
        )

    def blame(self, positions: Sequence[int]) -> bool:
        """Decode each of the samples, after a batch that held them has failed; whether a bad one was found."""
        if self._samples.store is not None:
            return False
        known = len(self._spoiled)
        self._examine(list(dict.fromkeys(positions)))
        return len(self._spoiled) > known

    def _differs(self, position: int) -> bool:
        if position in self._spoiled:
            return False
        samples = self._samples
        known = self._touched.get(position, (int(samples.bytes_N[position]), int(samples.mtimes_N[position])))
        return self._state(position) != known

    def _state(self, position: int) -> tuple[int, int] | None:
        try:
            status = os.stat(self.file(position))
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns

    def _examine(self, positions: list[int]) -> None:
        if not positions:
            return
        before = [self._state(position) for position in positions]
        verdicts = examine(
            [os.fsdecode(self.file(position)) for position in positions],
            threads=self._threads,
            max_pixels=self._max_pixels,
        )
        for position, verdict, state in zip(positions, verdicts, before, strict=True):
            reason = verdict.reason if isinstance(verdict, Refused) else self._other_size(position, verdict)
            if reason is None:
                if state is not None:
                    self._touched[position] = state
            else:
                self._spoiled[position] = Spoiled(
                    id=int(self._samples.ids_N[position]), path=self._samples.paths[position], reason=reason
                )

    def _other_size(self, position: int, decoded: Decoded) -> str | None:
        """Homographies are made for the size that the scan saw."""
        height, width = self._samples.heights_N[position], self._samples.widths_N[position]
        if (decoded.height, decoded.width) == (height, width):
            return None
        return f"the image is now {decoded.width} x {decoded.height} pixels, and was {width} x {height} when scanned"

    def _next(self, position: int) -> int:
        n = len(self._samples)
        around_N = (position + 1 + np.arange(n - 1)) % n
        same_class_N = self._samples.labels_N[around_N] == self._samples.labels_N[position]
        for candidates_N in (around_N[same_class_N], around_N[~same_class_N]):
            for block_N in np.split(candidates_N, range(_BLOCK, len(candidates_N), _BLOCK)):
                found = block_N[self.readable(block_N)]
                if len(found):
                    return int(found[0])
        first = next(iter(self._spoiled.values()))
        raise UserError(
            f"None of the {n} images under {str(self._samples.root)!r} can be read any more; {first.path!r}: "
            f"{first.reason}. Put the images back, then repeat the command."
        )
