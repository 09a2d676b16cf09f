"""Make the table of docs/reference/losses.md from the registry: python -m fused_losses.losses.matrix."""

from __future__ import annotations

from . import FAMILY
from .registry import Entry

COLUMNS = (
    "loss", "variants", "logits, hidden", "log-probs", "packed", "no reference", "saved reference", "f-divergence", "source"
)  # fmt: skip


def row(entry: Entry) -> list[str]:
    """Return the cells of a loss, one for each of COLUMNS; test_family_rules.py checks that every "no" is an error."""

    def yes(flag: bool) -> str:
        return "yes" if flag else "no"

    return [
        f"`{entry.call.__name__}`",
        "; ".join(name or "-" for name in entry.variants),
        "yes",
        yes(not entry.distribution),
        "yes",
        yes(entry.ref != "needed"),
        "-" if entry.ref == "unused" else yes(not entry.distribution),
        yes("divergence" in entry.options),
        entry.source,
    ]


def matrix() -> str:
    rows = [
        COLUMNS,
        ["---"] * len(COLUMNS),
        *(row(entry) for entry in sorted(FAMILY.values(), key=lambda entry: entry.batch)),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(matrix())
