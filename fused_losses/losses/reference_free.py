"""Pairs without a reference model: SimPO, CPO, ORPO."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
