"""Liger's fused heads on our operators: its own fallbacks, eager float64, its modules, a transformers model, refusals."""

import copy
import importlib
import os

import pytest
import torch
import torch.distributed as dist
from helpers import relative
from torch.nn.functional import cross_entropy

import fused_losses as fl
from fused_losses.integrations import liger_kernels, patching

liger = pytest.importorskip("liger_kernel.transformers")
ops = importlib.import_module("liger_kernel.ops")
functional = importlib.import_module("liger_kernel.transformers.functional")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

N, H, V = 11, 8, 37
CLASSES = (
    "LigerFusedLinearCrossEntropyFunction", "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction", "LigerFusedLinearJSDFunction",
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


@pytest.fixture
def applies():
    """Every class has its own `apply` afterwards."""
    before = [getattr(ops, name).apply for name in CLASSES]
    yield
    assert [getattr(ops, name).apply for name in CLASSES] == before


@pytest.fixture
def inside(applies):
    with liger_kernels.patched():
        yield


def leaves(dtype=torch.float32, bias=False):
    made = [torch.randn(N, H), torch.randn(V, H), *([torch.randn(V)] if bias else [])]
    return [x.to(dtype).requires_grad_() for x in made]


def targets():
    y = torch.randint(V, (N,))
    y[2:4] = -100
    return y


def eager(x, weight, y, bias=None, softcap=None, z_loss=0.0, smoothing=0.0, scaled=False):
    """Losses [N] in float64."""
    z = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * z.logsumexp(-1).square() * (y != -100)
    p = z.log_softmax(-1).gather(-1, y.clamp(min=0)[:, None]).squeeze(-1).exp().detach()
    return losses * p if scaled else losses


CASES = {
    "plain": {}, "softcap": {"softcap": 3.0}, "smoothing": {"smoothing": 0.1}, "z-loss": {"z_loss": 0.01},
    "token scaling": {"scaled": True}, "bias": {"bias": True},
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_cross_entropy(inside, case, reduction):
    o = dict(CASES[case])
    x, weight, *bias = leaves(bias=o.pop("bias", False))
    y = targets()
    found = functional.liger_fused_linear_cross_entropy(
        x,
        weight,
        y,
        *bias,
        lse_square_scale=o.get("z_loss", 0.0),
        label_smoothing=o.get("smoothing", 0.0),
        softcap=o.get("softcap"),
        use_token_scaling=o.get("scaled", False),
        reduction=reduction,
        return_z_loss=True,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )
    each = eager(x, weight, y, *bias, **o)
    truth = {"mean": each.sum() / (y != -100).sum(), "sum": each.sum(), "none": each}[reduction]
    assert found.loss.shape == truth.shape and relative(found.loss, truth) <= 1e-5
    without = eager(x, weight, y, *bias, **{**o, "z_loss": 0.0})
    z_loss = truth - {"mean": without.sum() / (y != -100).sum(), "sum": without.sum(), "none": without}[reduction]
    torch.testing.assert_close(found.z_loss.double(), z_loss, rtol=1e-4, atol=1e-6)
    g = torch.randn_like(truth)
    mine, exact = (torch.autograd.grad((a * g).sum(), [x, weight, *bias]) for a in (found.loss, truth))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, exact, strict=True))
    z = x @ weight.T + (bias[0] if bias else 0)
    hits = (z.argmax(-1) == y).float()
    accuracy = hits if reduction == "none" else hits.sum() / (y != -100).sum()
    torch.testing.assert_close(found.token_accuracy, accuracy)
    assert torch.equal(found.predicted_tokens, z.argmax(-1).masked_fill(y == -100, -1))


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_scaled_cross_entropy_is_ligers(applies, return_entropy, selected):
    """Liger's own fallback for a CPU, the same call outside the block."""
    x, weight = leaves()
    y = targets()
    ids = torch.tensor([3, 30, 3]) if selected else None
    found = []
    for block in (patching.Patch("nothing", "", patching.EntryPoints).block(), liger_kernels.patched()):
        with block:
            out = ops.LigerFusedLinearScaledCrossEntropyFunction.apply(x, weight, y, 0.7, -100, 1, return_entropy, ids)
        out = out if isinstance(out, tuple) else (out,)
        total = sum((part * torch.linspace(1, 2, part.numel()).view(part.shape)).sum() for part in out)
        found.append((*out, *torch.autograd.grad(total, [x, weight])))
    assert len(found[0]) == len(found[1]) == 3 + return_entropy + selected
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_scaled_cross_entropy_of_a_split_head(inside, group):
    """tests/engine/test_vocab_parallel.py has the same operator on several ranks."""
    x, weight = leaves()
    y = targets()
    nll, entropy = ops.LigerFusedLinearScaledCrossEntropyTPFunction.apply(x, weight, y, group, 0.7, -100, 1, True)
    z = x.double() @ weight.double().T / 0.7
    truth = cross_entropy(z, y, reduction="none"), torch.distributions.Categorical(logits=z).entropy() * (y != -100)
    assert relative(nll, truth[0]) <= 1e-5 and relative(entropy, truth[1]) <= 1e-5
    mine, exact = (torch.autograd.grad(a.sum() + b.sum(), [x, weight]) for a, b in ((nll, entropy), truth))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, exact, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd(inside, beta):
    x, weight = leaves()
    teacher = [torch.randn(N, 2 * H), torch.randn(V, 2 * H)]
    y = targets()
    found = liger.LigerFusedLinearJSD(jsd_beta=beta, temperature=0.8)(x, weight, *teacher, y)
    p, q = ((a.double() @ b.double().T / 0.8).log_softmax(-1) for a, b in ((x, weight), teacher))
    if beta in (0.0, 1.0):
        each = (q.exp() * (q - p)).sum(-1) if beta == 0.0 else (p.exp() * (p - q)).sum(-1)
    else:
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        each = beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)
    truth = each[y != -100].mean()
    assert relative(found, truth) <= 1e-5
    mine, exact = (torch.autograd.grad(a, [x, weight]) for a in (found, truth))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, exact, strict=True))


def test_a_model_of_transformers_with_ligers_own_patch(applies):
    """use_liger_kernel, with LigerForCausalLMLoss: the same loss and gradients as the plain model, on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    plain = LlamaForCausalLM(config)
    theirs = copy.deepcopy(plain)
    kinds = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
    liger.apply_liger_kernel_to_llama(model=theirs, fused_linear_cross_entropy=True, **kinds)
    ids = torch.randint(V, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    for more in ({}, {"num_items_in_batch": 20}):
        with liger_kernels.patched():
            out = theirs(input_ids=ids, labels=labels, **more)
            assert out.logits is None
            out.loss.backward()
        expected = plain(input_ids=ids, labels=labels, **more)
        expected.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss)
        for a, b in zip(theirs.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
            a.grad = b.grad = None


def test_blocks_may_be_nested(applies):
    own = ops.LigerFusedLinearJSDFunction.apply
    with liger_kernels.patched():
        liger_kernels.patch()
        liger_kernels.unpatch()
        assert ops.LigerFusedLinearJSDFunction.apply is liger_kernels._jsd
    assert ops.LigerFusedLinearJSDFunction.apply == own
    with pytest.raises(RuntimeError, match="liger_kernel is not patched"):
        liger_kernels.unpatch()


def test_another_version_is_refused(monkeypatch, applies):
    monkeypatch.setattr(patching, "version", lambda name: "0.9.0")
    with pytest.raises(ImportError, match=r"liger_kernel: expected version 0\.8\.x, tested with 0\.8\.5, got 0\.9\.0"):
        liger_kernels.patch()


REFUSED = [
    ({"ce_weight": torch.ones(V)}, "ce_weight: class weights are not computed"),
    ({"use_token_scaling": True, "label_smoothing": 0.1}, "use_token_scaling: is not computed beside"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_refused(inside, options, words):
    x, weight = leaves()
    with pytest.raises(NotImplementedError, match=words):
        functional.liger_fused_linear_cross_entropy(x, weight, targets(), **options)


def test_importing_it_does_not_import_liger():
    from helpers import python

    code = "import sys, fused_losses.integrations.liger_kernels; print('liger_kernel' in sys.modules)"
    assert python("-c", code, check=True, env=os.environ).stdout.strip() == "False"
    assert fl.__version__
