"""The words of messages: errors for unknown names, which suggest the nearest known names, and tensors in short."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
# what people look for under another name than ours
OTHER_NAMES = {
    "ppo_loss": "grpo_loss", "reinforce_loss": "grpo_loss", "rloo_loss": "grpo_loss", "gspo_loss": "grpo_loss",
    "dapo_loss": "grpo_loss", "sft": "cross_entropy_loss", "sft_loss": "cross_entropy_loss", "nll_loss": "cross_entropy_loss",
    "dft_loss": "cross_entropy_loss", "gkd_loss": "distillation_loss", "kd_loss": "distillation_loss",
    "jsd_loss": "distillation_loss", "kl_loss": "distillation_loss", "apo_loss": "preference_loss", "dpo": "sigmoid",
    "dpo_loss": "sigmoid", "jsd": "js", "tv": "total_variation",
}  # fmt: skip


def nearest(got: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known names similar to got, or an empty string."""
    if not isinstance(got, str) or not got:
        return ""
    names, word = list(known), got.lower().replace("-", "_")
    meant = OTHER_NAMES.get(word)
    matches = [meant] if meant in names else get_close_matches(word, names, n=2, cutoff=0.7)
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


def tensor_words(x: Tensor) -> str:
    """Return the words for a tensor: [2, 3] (float32, requires grad)."""
    words = [str(x.dtype).removeprefix("torch."), *([] if x.is_cpu else [str(x.device)])]
    return f"{list(x.shape)} ({', '.join([*words, 'requires grad'] if x.requires_grad else words)})"


def short(x: object) -> str:
    """Return the repr of an object, in which tensors are replaced by their words."""
    if isinstance(x, Tensor):
        return tensor_words(x)
    if isinstance(x, dict):
        return f"{{{', '.join(f'{key!r}: {short(value)}' for key, value in x.items())}}}"
    if isinstance(x, tuple) and hasattr(x, "_asdict"):
        return f"{type(x).__name__}({', '.join(f'{name}={short(value)}' for name, value in x._asdict().items())})"
    return repr(x)


def short_fields(x: DataclassInstance) -> str:
    """Return a repr with the fields that differ from their defaults, in which tensors are replaced by their words."""
    given = [(f.name, getattr(x, f.name)) for f in fields(x) if getattr(x, f.name) is not f.default]
    return f"{type(x).__name__}({', '.join(f'{name}={short(value)}' for name, value in given)})"


def present(name: str, x: T | None) -> T:
    """Return x; raise if it is None, because the call did not ask for it."""
    if x is None:
        raise ValueError(f"{name}: this call did not ask for it")
    return x
