"""The environment variables that kdagen reads, all of them."""

from __future__ import annotations

import os


def level() -> int:
    """KDAGEN_DEBUG, 0 to 5: how much of its inner workings kdagen shows. From 1: TileLang's output and C++ traces."""
    text = os.environ.get("KDAGEN_DEBUG", "0")
    return int(text) if text.isdigit() else 1
