"""How many workers a run has: a number, or from so many to so many."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Crew:
    """Between `least` and `most` workers, as many as there is room for; none: the process that asks does the work."""

    least: int
    most: int

    @classmethod
    def of(cls, words: int | str) -> Crew:
        """Read `4`, or `2:8`.

        Raises:
            ValueError: it is neither.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(words))
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if most < least or least == 0 < most:
            raise ValueError(f"{words} is neither a number of workers nor LEAST:MOST")
        return cls(least, most)

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.elastic else str(self.most)

    @property
    def elastic(self) -> bool:
        """Whether their number may change while a run is going on."""
        return self.least < self.most

    @property
    def sizes(self) -> range:
        """How many processes there may be."""
        return range(max(1, self.least), max(1, self.most) + 1)
