"""Where kvcomp keeps what it fetches and what is made for it."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`name` in KVCOMP_CACHE, else in the user's cache folder, which XDG_CACHE_HOME names."""
    if own := os.environ.get("KVCOMP_CACHE"):
        return Path(own).expanduser().absolute() / name
    # The specification of XDG has relative paths ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (given if given.is_absolute() else Path.home() / ".cache") / "kvcomp" / name
