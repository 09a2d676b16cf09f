"""Errors for unknown names: each message suggests the nearest known names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def nearest(got: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known names similar to got, or an empty string."""
    if not isinstance(got, str) or not got:
        return ""
    names, word = list(known), got.lower()
    matches = get_close_matches(word, names, n=2, cutoff=0.7)
    matches = matches or [name for name in names if word in name.split("_") or name.startswith(word)][:2]
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def unknown(what: str, got: object, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not one of the known names."""
    names = list(known)
    return ValueError(f"{what}: unknown name {got!r}; known: {', '.join(names)}{nearest(got, names)}")


def not_one_of(what: str, got: object, known: Iterable[str]) -> ValueError:
    """Return the error for an option with a few allowed values, if got is not one of them."""
    names = list(known)
    return ValueError(f"{what}: expected one of {', '.join(names)}, got {got!r}{nearest(got, names)}")


def shape_of(*sizes: object) -> str:
    """Return the words for a shape of numbers and letters: [2, 3, V]."""
    return f"[{', '.join(map(str, sizes))}]"


def present(name: str, x: T | None) -> T:
    """Return x; raise if it is None, because the call did not ask for it."""
    if x is None:
        raise ValueError(f"{name}: this call did not ask for it")
    return x
