"""What a training shows on its way."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cluster import environment
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed; the journal has everything all the same."""

    quiet: bool = False
    """Print mistakes and nothing else."""
    json: bool = False
    """Print the journal's events instead, a JSON object a line."""
    verbose: bool = False
    """Print what Ray and the worker processes say, too."""

    def __post_init__(self) -> None:
        if self.quiet and self.json:
            raise UserError("--quiet and --json are two kinds of output. Give one of them.")

    def console(self) -> Console:
        """Where words go; to be asked before Ray is imported."""
        if self.verbose:
            os.environ[environment.VERBOSE] = "1"
        return Console(quiet=self.quiet or self.json)

    def on_event(self) -> Callable[[Mapping[str, Any]], None] | None:
        """What takes the journal's events; None where nobody wants them."""
        return _tell if self.json else None


def _tell(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
