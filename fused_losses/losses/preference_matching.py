"""PM-RLHF: the preference-matching regulariser, rewards and metrics; Bradley-Terry and Plackett-Luce ranking losses."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
