"""Cross entropy with label smoothing and z-loss."""

from __future__ import annotations

__all__: list[str] = []
