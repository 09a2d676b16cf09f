"""The GRPO family: policy-gradient losses of sampled responses with advantages."""

from __future__ import annotations

from .common import Entry

__all__: list[str] = []

ENTRIES: list[Entry] = []
