"""The drop-ins for TRL's functions: against eager code in float64, and against TRL where it is installed."""

import inspect
import math

import pytest
import torch
from helpers import double, in_pairs, logits, relative

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

V = 31
Y = torch.tensor([[3, -100, 7, 0], [30, 5, -100, 11], [-100, -100, -100, -100]])
NAMES = ["selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits", "generalized_jsd_loss"]
ONE, SEVERAL = (3, 4), (3, 4, 5)


def inputs(device, shape=ONE, dtype=torch.float32):
    z, w = logits((3, 4, V), device, dtype)
    index = torch.randint(0, V, shape, device=device)
    return z, w, index, torch.rand(shape, device=device) < 0.7


@pytest.mark.parametrize(
    ("backend", "shape", "kind", "temperature", "masked"),
    in_pairs(["torch", "triton"], [ONE, SEVERAL], [torch.int64, torch.int32], [1.0, 0.7], [False, True]),
    indirect=["backend"],
)
def test_selective_log_softmax(backend, device, shape, kind, temperature, masked):
    z, _, index, mask = inputs(device, shape)
    mask = mask.to(kind) if masked else None
    out = fl.selective_log_softmax(z, index.to(kind), temperature, mask)
    z64 = double(z)
    ids = index if shape == SEVERAL else index.unsqueeze(-1)
    truth = (z64 / temperature).log_softmax(-1).gather(-1, ids).view(shape)
    truth = truth if mask is None else truth * mask
    assert out.shape == shape and relative(out, truth) <= 1e-6
    g = torch.randn(shape, device=device)
    mine, exact = torch.autograd.grad(out, z, g)[0], torch.autograd.grad(truth, z64, g.double())[0]
    assert relative(mine, exact) <= 1e-6
    assert relative(fl.reference.selective_log_softmax(z64, index, temperature, mask), truth) <= 1e-12


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("learns", [False, True])
def test_with_entropy(backend, device, shape, learns):
    z, _, index, mask = inputs(device, shape)
    mask = mask if shape == ONE else None
    logps, entropy = fl.selective_log_softmax_and_entropy(z, index, learns, 0.7, mask)
    z64 = double(z)
    p = (z64 / 0.7).log_softmax(-1)
    exact = -(p.exp() * p).sum(-1)
    exact = exact if mask is None else exact * mask
    assert entropy.shape == ONE and relative(entropy, exact) <= 1e-6
    torch.testing.assert_close(logps, fl.selective_log_softmax(z, index, 0.7, mask))
    assert logps.requires_grad and entropy.requires_grad == learns
    if learns:
        mine, theirs = torch.autograd.grad(entropy.sum(), z)[0], torch.autograd.grad(exact.sum(), z64)[0]
        assert relative(mine, theirs) <= 1e-6
    twin = fl.reference.selective_log_softmax_and_entropy(z64, index, learns, 0.7, mask)
    assert relative(twin[1], exact) <= 1e-12 and twin[1].requires_grad == learns


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 3, 2)])
def test_entropy_from_logits(backend, device, lead):
    z, _ = logits((*lead, V), device)
    out, z64 = fl.entropy_from_logits(z, chunk_size=2), double(z)
    truth = fl.reference.entropy_from_logits(z64)
    assert out.shape == lead and relative(out, truth) <= 1e-6
    assert relative(torch.autograd.grad(out.sum(), z)[0], torch.autograd.grad(truth.sum(), z64)[0]) <= 1e-6
    uniform = torch.zeros(2, V, device=device)
    torch.testing.assert_close(fl.entropy_from_logits(uniform), torch.full((2,), math.log(V), device=device))


def eager_jsd(z, w, y, beta, temperature):
    """[B, T, V], 0 where a token does not count."""
    p, q = (z / temperature).softmax(-1), (w / temperature).softmax(-1)
    if beta == 0:
        terms = q * (q / p).log()
    elif beta == 1:
        terms = p * (p / q).log()
    else:
        m = beta * q + (1 - beta) * p
        terms = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
    return terms if y is None else terms * (y != -100).unsqueeze(-1)


def compare_jsd(device, y, beta, divisor, **given):
    z, w, *_ = inputs(device)
    out = fl.generalized_jsd_loss(z, w, y, beta, 0.9, **given)
    z64, w64 = double(z), double(w)
    truth = eager_jsd(z64, w64, y, beta, 0.9).sum() / divisor
    assert out.shape == () and relative(out, truth) <= 1e-5
    for mine, exact in zip(torch.autograd.grad(out, (z, w)), torch.autograd.grad(truth, (z64, w64)), strict=True):
        assert relative(mine, exact) <= 1e-5
    assert relative(fl.reference.generalized_jsd_loss(z64, w64, y, beta, 0.9, **given), truth) <= 1e-10


@pytest.mark.parametrize("beta", [0, 0.0, 0.1, 0.5, 1, 1.0])
def test_generalized_jsd_loss(backend, device, beta):
    compare_jsd(device, Y.to(device), beta, 6)


@pytest.mark.parametrize("beta", [0, 0.3])
@pytest.mark.parametrize("with_labels", [False, True])
def test_reductions_of_jsd(device, monkeypatch, beta, with_labels):
    """ "batchmean" without labels is per sequence, "mean" per token and word."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    y, tokens = (Y.to(device), 6) if with_labels else (None, 12)
    for reduction, divisor in (("batchmean", 6 if with_labels else 3), ("sum", 1), ("mean", tokens * V)):
        compare_jsd(device, y, beta, divisor, reduction=reduction)
        for items in (7, torch.tensor(7, device=device)):
            compare_jsd(device, y, beta, 7, reduction=reduction, num_items_in_batch=items)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_no_token_counts(backend, device, reduction):
    z, w, *_ = inputs(device)
    out = fl.generalized_jsd_loss(z, w.detach(), torch.full(ONE, -100, device=device), reduction=reduction)
    assert out == 0 and not torch.autograd.grad(out, z)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=["one", "several"])
def test_low_precision_is_never_worse_than_eager(device, shape, dtype, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    z, w, index, _ = inputs(device, shape, dtype)
    z64, w64 = double(z), double(w)
    calls = [
        lambda f, z, w: f.selective_log_softmax(z, index),
        lambda f, z, w: f.selective_log_softmax(z, index, 0.7),
        lambda f, z, w: f.entropy_from_logits(z),
        lambda f, z, w: f.generalized_jsd_loss(z, w, None, 0.3, 0.9),
    ]
    for call in calls:
        ours, eager, truth = call(fl, z, w), call(fl.reference, z, w), call(fl.reference, z64, w64)
        assert ours.dtype == torch.float32
        assert relative(ours, truth) <= max(1e-6, relative(eager, truth))
        grads = [torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in ((ours, z), (eager, z), (truth, z64))]
        assert grads[0].dtype == dtype
        assert relative(grads[0], grads[2]) <= max(relative(grads[1], grads[2]), torch.finfo(dtype).eps / 2)


def test_rows_that_are_skipped_may_hold_anything(backend, device, poison):
    z, _, index, _ = inputs(device)
    several = inputs(device, SEVERAL)[2]
    with torch.no_grad():
        z[1] = math.nan
    mask = torch.ones(ONE, device=device, dtype=torch.bool)
    mask[1] = False
    index[1], several[1] = -7, 1 << 30
    for ids, rows in ((index, mask), (several, mask.unsqueeze(-1).expand(SEVERAL))):
        out = fl.selective_log_softmax(z, ids, row_mask=rows)
        g = torch.autograd.grad(out.sum(), z)[0]
        assert not out[1].any() and out.isfinite().all() and g.isfinite().all() and not g[1].any()


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("token", [-100, -1, V])
def test_a_token_out_of_range_is_no_token(backend, device, shape, token):
    """-100 too: these functions know no ignore_index."""
    if backend == "torch" and device.type != "cpu":
        pytest.skip("an assertion on the device ends the process")
    z, _, index, _ = inputs(device, shape)
    index.view(-1)[2] = token
    if device.type == "cpu" and (backend == "torch" or shape == SEVERAL):
        with pytest.raises(ValueError, match=f"got {token}"):
            fl.selective_log_softmax(z, index)
    else:
        out = fl.selective_log_softmax(z, index).flatten()
        assert out[2].isnan() and out.isnan().sum() == 1


def test_signatures():
    """TRL 1.16's, and the twins' are the same."""
    expected = {
        "selective_log_softmax": {"temperature": 1.0, "row_mask": None},
        "selective_log_softmax_and_entropy": {"entropy_requires_grad": True, "temperature": 1.0, "row_mask": None},
        "entropy_from_logits": {"chunk_size": 128},
        "generalized_jsd_loss": {
            "labels": None, "beta": 0.5, "temperature": 1.0, "reduction": "batchmean", "num_items_in_batch": None,
        },
    }  # fmt: skip
    for name in NAMES:
        own = inspect.signature(getattr(fl, name)).parameters
        assert {n: p.default for n, p in own.items() if p.default is not p.empty} == expected[name]
        assert own.keys() == inspect.signature(getattr(fl.reference, name)).parameters.keys()


def test_against_trl(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, index, mask = inputs("cpu", dtype=torch.float64)
    several = inputs("cpu", SEVERAL)[2]
    theirs = {name: getattr(gkd if name == NAMES[3] else utils, name, None) for name in NAMES}
    calls = [
        (NAMES[0], (z, index)), (NAMES[0], (z, several)), (NAMES[0], (z, index, 0.7)), (NAMES[0], (z, index, 0.7, mask)),
        (NAMES[1], (z, index)), (NAMES[1], (z, index, False, 0.7, mask)), (NAMES[2], (z,)), (NAMES[2], (z, 5)),
        *[(NAMES[3], (z, w, y, beta, 0.9, reduction)) for y in (None, Y) for beta in (0, 0.3, 1) for reduction in
          ("batchmean", "sum", "mean")],
        (NAMES[3], (z, w, Y, 0.3, 1.0, "batchmean", 5)), (NAMES[3], (z, w, Y, 0.3, 1.0, "mean", torch.tensor(5))),
    ]  # fmt: skip
    for name, args in calls:
        if theirs[name] is None or len(inspect.signature(theirs[name]).parameters) < len(args):
            continue  # an older TRL
        mine, true = getattr(fl, name)(*args), theirs[name](*args)
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (mine, true)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            assert a.requires_grad == b.requires_grad
            if b.requires_grad:
                grads = [torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (a, b)]
                torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
    if None not in theirs.values():
        for name, function in theirs.items():
            other = inspect.signature(function).parameters
            assert [*inspect.signature(getattr(fl, name)).parameters] == [*other], name


Z, I = torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.long)
BAD = [
    (lambda: fl.selective_log_softmax(Z, I[:1]), ValueError, r"index: expected \[2, 3\] or \[2, 3, K\], got \[1, 3\]"),
    (lambda: fl.selective_log_softmax(Z, I[..., None, None]), ValueError, "index: expected"),
    (lambda: fl.selective_log_softmax(Z, 3), ValueError, "index: expected"),
    (lambda: fl.selective_log_softmax([1], I), TypeError, "logits: expected a tensor, got list"),
    (lambda: fl.selective_log_softmax(Z, I, temperature=0), ValueError, "temperature: expected a finite number > 0"),
    (lambda: fl.selective_log_softmax(Z, I, 1.0, I[0]), ValueError, r"row_mask: expected \[2, 3\] as index is"),
    (lambda: fl.selective_log_softmax_and_entropy(Z, I[..., None], row_mask=I[..., None]), ValueError, "row_mask: goes with"),
    (lambda: fl.entropy_from_logits(None), TypeError, "logits: expected a tensor"),
    (lambda: fl.generalized_jsd_loss(Z, Z, reduction="none"), ValueError, "reduction: expected one of batchmean, sum, mean"),
    (lambda: fl.generalized_jsd_loss(Z, Z, beta=1.5), ValueError, r"beta: expected a number in \[0, 1\]"),
    (lambda: fl.generalized_jsd_loss(Z, Z[..., 1:]), ValueError, "ref: expected the policy's vocabulary"),
    (lambda: fl.generalized_jsd_loss(Z, Z.half()), TypeError, "ref: expected torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
