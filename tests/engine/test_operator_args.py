"""Arguments of operators by name: the schema, and the way to the flat list and back."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_losses import divergences
from fused_losses.core.divergences import Divergence
from fused_losses.core.layout import PairLossSpec, SymInt
from fused_losses.core.margin_losses import TERMS
from fused_losses.engine import hidden_ops, logits_ops, pair_ops
from fused_losses.engine.operator_args import Layout


class Side(NamedTuple):
    x: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0


class Options(NamedTuple):
    asked: tuple[Divergence, ...]
    count: SymInt
    name: str


class Args(NamedTuple):
    policy: Side
    ref: Side | None
    options: Options
    flag: bool


class Listed(NamedTuple):
    label: object
    side: Side
    extras: tuple[Tensor, ...]


LAYOUT = Layout(Args)
X, BIAS = torch.ones(2), torch.ones(3)
ASKED = divergences.parse(["js", "alpha(a=0.3)"])
ARGS = Args(Side(X, BIAS, 0.5), None, Options(ASKED, 3, "n"), True)


def test_the_schema_is_flat():
    assert LAYOUT.schema() == (
        "Tensor policy_x, Tensor? policy_bias, float policy_scaling, Tensor? ref_x, Tensor? ref_bias, float? ref_scaling, "
        "str options_asked, SymInt options_count, str options_name, bool flag"
    )
    assert LAYOUT.schema("policy_x").startswith("Tensor(a!) policy_x, Tensor? ")


def test_packed_and_unpacked():
    packed = LAYOUT.pack(ARGS)
    assert packed[3:] == [None, None, None, "js;alpha(a=0.3)", 3, "n", True]
    assert LAYOUT.unpack(packed) == ARGS
    both = ARGS._replace(ref=Side(BIAS))
    assert LAYOUT.unpack(LAYOUT.pack(both)) == both
    none = ARGS._replace(options=ARGS.options._replace(asked=()))
    assert LAYOUT.unpack(LAYOUT.pack(none)) == none
    with pytest.raises(ValueError, match="zip"):
        LAYOUT.unpack([*packed, None])


def test_flags_and_gradients_have_the_names_of_the_arguments():
    needs = LAYOUT.named([True, False, False, False, True, *[False] * 5])
    assert needs.policy.x and needs.ref.bias and not needs.policy.bias and not needs.ref.x
    gradients = LAYOUT.gradients(policy={"x": X}, ref={"bias": BIAS})
    assert gradients[:2] == [X, None] and gradients[3] is None and gradients[4] is BIAS and gradients[5:] == [None] * 5


def test_what_an_autograd_function_saves():
    layout, ctx = Layout(Listed), SimpleNamespace()
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    label = object()
    value = Listed(label, Side(X, None, 2.0), (X, BIAS))
    layout.save(ctx, value)
    assert all(x is None or isinstance(x, Tensor) for x in ctx.saved_tensors) and len(ctx.saved_tensors) == 4
    found = layout.saved(ctx)
    assert found.label is label and found.side.scaling == 2.0 and found.side.bias is None
    assert found.side.x is X and found.extras[1] is BIAS
    assert layout.gradients(side={"x": BIAS}, extras=[None, X])[3:] == [None, None, X]
    with pytest.raises(TypeError, match="label: no argument of an operator"):
        layout.schema()


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_passed_by_name(name):
    spec = PairLossSpec(divergences.get("js"), TERMS[name], (0.1, 0.2), 0.3, 4, True)
    args = pair_ops.PairLossArgs(X, None, X, None, spec, "torch")
    packed = pair_ops.ARGS.pack(args)
    assert name in packed and pair_ops.ARGS.unpack(packed).spec == spec


@pytest.mark.parametrize("module", [hidden_ops, logits_ops, pair_ops], ids=lambda m: m.__name__)
def test_arguments_of_operators_have_different_names(module):
    for layout in (module.ARGS, module.BACKWARD_ARGS):
        names = [slot.name for slot in layout.slots]
        assert len(set(names)) == len(names)
