"""Name the tensors of policy and reference, as operators take them, and the flags and gradients of these tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor


class LogitsOperand(NamedTuple):
    """One side given as logits [..., V]."""

    logits: Tensor


class LowRank(NamedTuple):
    """The factors of LoRA: the head is W + scaling b a."""

    a: Tensor  # [rank, H]
    b: Tensor  # [V, rank]
    scaling: float


class HiddenOperand(NamedTuple):
    """One side given as hidden states x [..., H] and a head."""

    x: Tensor
    weight: Tensor  # [V, H]
    bias: Tensor | None = None
    low_rank: LowRank | None = None


Operand = LogitsOperand | HiddenOperand


class Inputs(NamedTuple):
    """The tensors of one side: x is hidden states [..., H] with a weight, logits [..., V] without."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    @property
    def hidden(self) -> int:
        """Return H plus the rank of the factors a and b; 0 for logits."""
        return 0 if self.weight is None else self.weight.shape[1] + (0 if self.a is None else self.a.shape[0])

    def operand(self) -> Operand:
        return LogitsOperand(self.x) if self.weight is None else self.hidden_operand()

    def hidden_operand(self) -> HiddenOperand:
        """Return hidden states and their head; raise TypeError for logits."""
        if self.weight is None:
            raise TypeError(f"x: expected hidden states with the weight of a head, got logits {list(self.x.shape)}")
        low_rank = None if self.a is None or self.b is None else LowRank(self.a, self.b, self.scaling)
        return HiddenOperand(self.x, self.weight, self.bias, low_rank)


class InputFlags(NamedTuple):
    """Whether the gradient of each tensor of one side is wanted."""

    x: bool = False
    weight: bool = False
    bias: bool = False
    a: bool = False
    b: bool = False

    @classmethod
    def of(cls, flags: Any) -> InputFlags:
        """Return the flags from an object with these names, and perhaps more."""
        return cls(flags.x, flags.weight, flags.bias, flags.a, flags.b)

    @classmethod
    def required(cls, inputs: Inputs | None) -> InputFlags:
        """Return which of the tensors require a gradient."""
        if inputs is None:
            return cls()
        tensors = inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b
        return cls(*[x is not None and x.requires_grad for x in tensors])

    @property
    def head(self) -> bool:
        """Return whether any gradient of the head is wanted."""
        return self.weight or self.bias or self.a or self.b

    @property
    def some(self) -> bool:
        """Return whether any gradient is wanted."""
        return self.x or self.head


class InputGradients(NamedTuple):
    """The gradients of the tensors of one side."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


class BothGradients(NamedTuple):
    """The gradients of the tensors of both sides."""

    policy: InputGradients = InputGradients()
    ref: InputGradients = InputGradients()


class Wanted(NamedTuple):
    """Whether the gradient of each tensor of both sides is wanted."""

    policy: InputFlags = InputFlags()
    ref: InputFlags = InputFlags()

    @property
    def some(self) -> bool:
        """Return whether any gradient is wanted."""
        return self.policy.some or self.ref.some

    def chosen(self, gradients: BothGradients) -> list[Any]:
        """Return the gradients that are wanted, in their order."""
        pairs = [*zip(self.policy, gradients.policy, strict=True), *zip(self.ref, gradients.ref, strict=True)]
        return [x for flag, x in pairs if flag]

    def placed(self, chosen: Iterable[Tensor]) -> BothGradients:
        """Return all gradients from those that are wanted, in their order."""
        left = iter(chosen)
        policy = [next(left) if flag else None for flag in self.policy]
        ref = [next(left) if flag else None for flag in self.ref]
        return BothGradients(InputGradients(*policy), InputGradients(*ref))
