"""LTA-Thinker: semantic alignment and reasoning focus of latent thoughts."""

from __future__ import annotations

__all__: list[str] = []
