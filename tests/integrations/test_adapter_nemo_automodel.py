"""The cross entropy for NeMo-Automodel's recipes: on a LinearCrossEntropy of the same methods in every run, and against the
losses of the package where it is there."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers import relative
from ranks import on_ranks
from stand_ins_of_packages import adapter, module, real
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

NAME, BASE = "nemo_automodel", "nemo_automodel.components.loss.linear_ce_base"
B, T, H, V = 2, 5, 8, 40


class LinearCrossEntropy(torch.nn.Module):
    """As in nemo-automodel 0.7.0, for a weight that is not sharded."""

    @staticmethod
    def materialize_lm_weight(lm_weight, *, grad_reduce_group=None):
        return lm_weight


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


@pytest.fixture(params=["stand-in", "package"])
def ours(request):
    if request.param == "package":
        real(BASE)
        yield importlib.import_module(f"fused_losses.integrations.{NAME}")
    else:
        with adapter(NAME, module(BASE, LinearCrossEntropy=LinearCrossEntropy)) as found:
            yield found


def numbers(dtype=torch.float32):
    labels = torch.randint(V, (B, T))
    labels[0, :2] = -100
    return torch.randn(B, T, H, dtype=dtype).requires_grad_(), labels, torch.randn(V, H, dtype=dtype).requires_grad_()


CASES = {  # of the loss, of its call
    "sum": ({}, {}),
    "mean": ({"reduction": "mean"}, {}),
    "none": ({"reduction": "none"}, {}),
    "softcap": ({"logit_softcapping": 3.0}, {"num_label_tokens": 7}),
    "no tokens": ({}, {"num_label_tokens": 0}),
    "weights": ({}, {"loss_weights": torch.rand(B, T)}),
    "weights and a count": ({"ignore_index": 3}, {"loss_weights": torch.rand(B, T), "num_label_tokens": 9}),
}


def prepared(options, labels):
    """The recipes put the ignore_index of the loss where labels are -100."""
    return labels.masked_fill(labels == -100, options.get("ignore_index", -100))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(ours, case):
    options, call = CASES[case]
    x, labels, weight = numbers()
    labels = prepared(options, labels)
    found = ours.FusedLinearCE(**options)(x, labels, weight, **call)
    z = x.double() @ weight.double().T
    cap = options.get("logit_softcapping")
    z = cap * torch.tanh(z / cap) if cap else z
    each = cross_entropy(z.transpose(1, 2), labels, reduction="none", ignore_index=options.get("ignore_index", -100))
    each = each * call.get("loss_weights", 1.0)
    count, how = call.get("num_label_tokens"), options.get("reduction", "sum")
    truth = each if how == "none" else each.sum() / ((labels != -100).sum() if how == "mean" else 1)
    truth = truth * 0.0 if count == 0 else truth / (count or 1)
    assert found.shape == truth.shape and found.dtype == torch.float32
    g = torch.randn(truth.shape)
    mine, exact = (torch.autograd.grad((a * g).sum(), (x, weight)) for a in (found, truth))
    for a, b in ((found, truth), *zip(mine, exact, strict=True)):
        assert relative(a, b) <= 1e-5 if b.any() else not a.any()


def test_packed_labels(ours):
    x, labels, weight = numbers()
    packed = ours.FusedLinearCE()(x.reshape(1, B * T, H), labels.flatten(), weight)
    torch.testing.assert_close(packed, ours.FusedLinearCE()(x, labels, weight))


def test_words(ours):
    x, labels, weight = numbers()
    with pytest.raises(ValueError, match="reduction: expected one of"):
        ours.FusedLinearCE(reduction="avg")
    with pytest.raises(ValueError, match="num_label_tokens: only goes with reduction='sum', got reduction='mean'"):
        ours.FusedLinearCE(reduction="mean")(x, labels, weight, num_label_tokens=3)
    with pytest.raises(ValueError, match=r"loss_weights: expected the shape of labels, \[2, 5\], got \[2\]"):
        ours.FusedLinearCE()(x, labels, weight, loss_weights=torch.ones(B))


@pytest.fixture
def package():
    real(BASE)
    name = "nemo_automodel.components.loss."
    mine = importlib.import_module(f"fused_losses.integrations.{NAME}")
    return SimpleNamespace(ours=mine, **{x: real(name + x) for x in ("loss", "utils", "chunked_ce", "linear_ce")})


@pytest.mark.parametrize("case", [case for case in CASES if case != "softcap"])
def test_their_chunked_cross_entropy(package, case):
    options, call = CASES[case]
    x, labels, weight = numbers()
    labels = prepared(options, labels)
    found = []
    for loss in (
        package.ours.FusedLinearCE(**options),
        package.chunked_ce.ChunkedCrossEntropy(compile=False, **options),
    ):
        out = loss(x, labels, weight, **call)
        found.append((out, *torch.autograd.grad(out.sum(), (x, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_their_fused_cross_entropy(package):
    """cut-cross-entropy's own torch_compile, with a softcap."""
    x, labels, weight = numbers()
    options, call = CASES["softcap"]
    theirs = package.linear_ce.FusedLinearCrossEntropy(impl="torch_compile", **options)
    found = []
    for loss in (package.ours.FusedLinearCE(**options), theirs):
        out = loss(x, labels, weight, **call)
        found.append((out, *torch.autograd.grad(out, (x, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_as_the_recipes_build_and_call_it(package):
    """build_loss_module of a `_target_`, then calculate_loss with a model: hidden states are what is passed."""
    loss = package.loss.build_loss_module(package.ours.FusedLinearCE, ignore_index=-1)
    assert type(loss) is package.ours.FusedLinearCE and loss.ignore_index == -1
    theirs = inspect.signature(package.linear_ce.FusedLinearCrossEntropy.forward).parameters
    assert list(inspect.signature(loss.forward).parameters) == list(theirs)[1:]
    x, labels, weight = numbers()
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(H, V, bias=False)
    given = {"hidden_states": x, "labels": labels, "model": model, "logits": None, "num_label_tokens": 4}
    found = package.utils.calculate_loss(loss, loss_weights=torch.full((B, T), 0.5), **given)
    truth = cross_entropy(model.lm_head(x).flatten(0, 1), labels.flatten(), reduction="sum") * 0.5 / 4
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def check_sharded(rank, group):
    """A head that is split over two ranks, with tokens of its own for each: the values and gradients of their loss."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from fused_losses.integrations.nemo_automodel import FusedLinearCE

    chunked = importlib.import_module("nemo_automodel.components.loss.chunked_ce").ChunkedCrossEntropy(compile=False)
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(2, B, T, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(V, (2, B, T), generator=g)
    mesh = DeviceMesh.from_group(group, "cpu")
    found = []
    for loss in (FusedLinearCE(), chunked):
        own = distribute_tensor(weight.clone(), mesh, [Shard(0)]).requires_grad_()
        states = x[rank].clone().requires_grad_()
        out = loss(states, labels[rank], own, num_label_tokens=20, grad_reduce_group=mesh.get_group())
        out.backward()
        assert own.grad.to_local().shape == (V // 2, H)
        found.append((out.detach(), states.grad, own.grad.to_local()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_head_that_is_sharded(package, monkeypatch):
    on_ranks(2, check_sharded)
