"""Single responses that are desirable or not: KTO, BCO, APO-zero."""

from __future__ import annotations

__all__: list[str] = []
