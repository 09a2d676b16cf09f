"""Single responses that are desirable or not: KTO, BCO, APO-zero."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
