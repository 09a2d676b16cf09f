"""UPO: a preference loss with advantage-weighted log-likelihood."""

from __future__ import annotations

__all__: list[str] = []
