"""The GRPO family: policy-gradient losses of sampled responses with advantages."""

from __future__ import annotations

__all__: list[str] = []
