"""Cross entropy with label smoothing and z-loss."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
