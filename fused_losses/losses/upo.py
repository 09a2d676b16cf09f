"""UPO: a preference loss with advantage-weighted log-likelihood."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
