"""Token-level DPO: sequential divergences over the whole vocabulary in the margin of a pair."""

from __future__ import annotations

__all__: list[str] = []
