"""LTA-Thinker: semantic alignment and reasoning focus of latent thoughts."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
