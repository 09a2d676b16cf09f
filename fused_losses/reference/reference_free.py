"""Pairs without a reference model: SimPO, CPO, ORPO."""

from __future__ import annotations

__all__: list[str] = []
