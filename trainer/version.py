"""Which onewarp this is."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path


def version() -> str:
    """The version, and the commit where this is a checkout, as "0.1.0 (4e38cbc + changes)"."""
    sha = commit()
    return metadata.version("onewarp") + (f" ({sha})" if sha else "")


def commit() -> str:
    """The short hash of the checkout that this code lies in; " + changes" where the code is another; "" elsewhere.

    Records of benchmarks do not count as code.
    """
    if not (Path(__file__).parents[1] / ".git").exists():  # of an installed copy git would name another's checkout
        return ""
    changed = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return _git("rev-parse", "--short", "HEAD") + (" + changes" if changed else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return ""
    return done.stdout.strip()
