"""Where other code breaks: policy near reference, suppressed tokens, extreme logits, NaN."""

import itertools
import math

import pytest
import torch
from helpers import ONE_PASS, ULP, double, gradient_errors, gradients, logits, outputs, promised_near, relative

import fused_losses as fl
from fused_losses import divergences

NAMES = divergences.names()
INF = float("inf")


NEAR = [(6e-3, 0.11), (4e-7, 9e-4), (5e-9, 1e-4)]  # a true KL, and the spread of log p - log q that it belongs to


@pytest.mark.parametrize("offset", [0.0, 7.3])
@pytest.mark.parametrize(("kl", "noise"), NEAR)
def test_near_the_reference(backend, device, kl, noise, offset):
    # The interpreter takes seconds a row; what smaller rows show of it is in test_what_the_readme_promises.
    rows = 1 if backend == "triton" and device.type == "cpu" else 8
    z = torch.randn(rows, 50304, device=device)
    w = z + noise * torch.randn(rows, 50304, device=device) + offset
    y = torch.randint(0, 50304, (rows,), device=device)
    ours = fl.token_stats(z, y, w, divergence=NAMES, shift=False).divergence
    truth = fl.reference.token_stats(z.double(), y, w.double(), divergence=NAMES, shift=False).divergence
    assert truth["reverse_kl"].mean().item() == pytest.approx(kl, rel=0.3)
    for name in NAMES:
        value, error = truth[name], (ours[name] - truth[name]).abs()
        bound = promised_near(name, value, torch.full_like(value, noise), offset)
        assert (ours[name] >= 0).all() and (error <= bound).all(), f"{name}: {(error / value).max():.1e}"


SPREADS = torch.tensor([0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4])
OFFSETS = torch.tensor([0.0, 0.7, -7.3, 30.0, -200.0])


@pytest.mark.parametrize(("scale", "parts"), [(0.3, 1), (1.0, 1), (6.0, 1), (3.0, 3)])
def test_what_the_readme_promises_of_one_pass_divergences(backend, device, scale, parts):
    """For flat and peaked rows, any spread of the log-ratios, models that lie a constant apart; in one sweep or merged."""
    spread, offset = (x.to(device) for x in (SPREADS.repeat_interleave(len(OFFSETS)), OFFSETS.repeat(len(SPREADS))))
    z = torch.randn(len(spread), 1031, device=device) * scale
    w = z + spread[:, None] * torch.randn_like(z) + offset[:, None]
    y = torch.randint(0, 1031, spread.shape, device=device)
    truth = fl.reference.token_stats(z.double(), y, w.double(), divergence=ONE_PASS, shift=False).divergence
    cuts = [0, 1031] if parts == 1 else [0, 206, 515, 1031]
    pieces = [
        fl.partial_stats(z[:, a:b], y, w[:, a:b], divergence=ONE_PASS, first=a) for a, b in itertools.pairwise(cuts)
    ]
    whole = fl.token_stats(z, y, w, divergence=ONE_PASS, shift=False) if parts == 1 else fl.merge_stats(pieces).close()
    for name in ONE_PASS:
        error = (whole.divergence[name] - truth[name]).abs()
        assert (whole.divergence[name] >= 0).all(), name
        allowed = promised_near(name, truth[name], spread.double(), offset.abs().double())
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.1f} of what is allowed"


@pytest.mark.parametrize("noise", [0.3, 0.03, 1e-3, 1e-4, 1e-6])
def test_peaked_rows_near_the_reference(backend, device, noise):
    """A row that one token dominates: no worse than eager torch, and never negative.

    Squared Hellinger is eager's best case, a sum of squares; one pass cannot take the square roots' difference.
    """
    z = torch.randn(8, 4099, device=device) * 6
    w = z + noise * torch.randn(8, 4099, device=device)
    y = z.argmax(-1)
    names = [n for n in NAMES if n != "total_variation"]
    ours = fl.token_stats(z, y, w, divergence=names, shift=False).divergence
    eager = fl.reference.token_stats(z, y, w, divergence=names, shift=False).divergence
    truth = fl.reference.token_stats(z.double(), y, w.double(), divergence=names, shift=False).divergence
    for name in names:
        assert (ours[name] >= 0).all(), name
        allowed = max(1e-5, relative(eager[name], truth[name]) * (40 if name == "squared_hellinger" else 1))
        assert relative(ours[name], truth[name]) <= allowed, name


def test_gradients_near_the_reference(backend, device):
    z, w = logits((4, 1031), device, spread=1e-4)
    y = torch.zeros(4, dtype=torch.long, device=device)
    z64, w64 = double(z), double(w)
    ours = fl.token_stats(z, y, w, divergence=NAMES, shift=False).divergence
    truth = fl.reference.token_stats(z64, y, w64, divergence=NAMES, shift=False).divergence
    for what, error in gradient_errors(ours, truth, (z, w), (z64, w64)):
        assert error <= 1e-5, f"{what}: {error:.1e}"


# What suppressing a token on one side alone makes infinite.
INFINITE = {
    "policy": {"forward_kl", "jeffreys", "neyman_chi2"},
    "ref": {"reverse_kl", "jeffreys", "pearson_chi2"},
    "both": set(),
}


@pytest.mark.parametrize("where", INFINITE)
@pytest.mark.parametrize("low", [-INF, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
def test_suppressed_tokens(backend, device, where, low):
    """Exact where the truth is finite, +inf where it is infinite; gradients always finite and, where defined, right."""
    z, w = logits((3, 300), device)
    with torch.no_grad():
        for side, x in (("policy", z), ("ref", w)):
            if where in (side, "both"):
                x[:, 10:60] = low
    y = torch.tensor([0, 5, 299], device=device)
    ours = fl.token_stats(z, y, w, divergence=NAMES, entropy=True, shift=False)
    # The truth: suppressed on both sides is a smaller vocabulary; on one side, a logit so low that it is as good as -inf.
    keep = torch.ones(300, dtype=torch.bool, device=device)
    if where == "both":
        keep[10:60] = False
    z64, w64 = (x.detach().double().clamp(min=-300)[:, keep].requires_grad_() for x in (z, w))
    targets = torch.tensor([0, 5, int(keep.sum()) - 1], device=device)
    truth = fl.reference.token_stats(z64, targets, w64, divergence=NAMES, entropy=True, shift=False)
    found, true = outputs(ours), outputs(truth)
    for name in INFINITE[where]:
        assert (found.pop(name) == INF).all(), name
        del true[name]
    for name, value in found.items():
        assert relative(value, true[name]) <= 1e-5, name
    for what, error in gradient_errors(found, true, (z, w), (z64, w64), pick=lambda g: g[:, keep]):
        assert error <= 1e-5, f"{what}: {error:.1e}"
    everything = sum(value.sum() for value in outputs(ours).values())
    for g in torch.autograd.grad(everything, (z, w)):
        assert g.isfinite().all() and not g[:, ~keep].any()


def test_forward_kl_gradient_is_exact_where_the_value_is_infinite(backend, device):
    """d KL(q||p) / dz = p - q needs no finite value."""
    z, w = logits((2, 40), device)
    with torch.no_grad():
        z[:, 3] = -INF
    kl = fl.token_stats(
        z, torch.zeros(2, dtype=torch.long, device=device), w, divergence="forward_kl", shift=False
    ).divergence["forward_kl"]
    (g,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(g, (z.softmax(-1) - w.softmax(-1)).detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0], ids=["flat", "usual", "T=0.05"])
@pytest.mark.parametrize("shift", [0.0, -1e4, 1e4])
def test_any_level_and_temperature(backend, device, scale, shift):
    """All-negative or huge logits, and rows whose policy and reference peak at different tokens by hundreds of nats."""
    z, w = logits((4, 2050), device, scale=scale, spread=scale)
    with torch.no_grad():
        z += shift
        w += shift + 30
    y = torch.randint(0, 2050, (4,), device=device)
    names = [n for n in NAMES if not n.endswith("chi2")]  # beyond float32 when the two disagree by hundreds of nats
    ours = fl.token_stats(z, y, w, divergence=names, entropy=True, shift=False)
    z64, w64 = double(z), double(w)
    truth = fl.reference.token_stats(z64, y, w64, divergence=names, entropy=True, shift=False)
    one = torch.ones(4, device=device)
    assert (ours.logps <= 0).all() and (ours.ref_logps <= 0).all() and (ours.entropy >= 0).all()
    found, true = outputs(ours), outputs(truth)
    for name, value in true.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-5, msg=name)
    steps = {"total_variation": total_variation_steps(z64.detach(), w64.detach())}
    # In the interpreter, where a backward takes seconds, of their mean: its error is at most the largest.
    values = [(found[name], value, steps.get(name, (0.0, 0.0))) for name, value in true.items()]
    if backend == "triton" and device.type == "cpu":
        mine, exact = (sum(side.values()) / len(values) for side in (found, true))
        values = [(mine, exact, [x / len(values) for x in steps["total_variation"]])]
    for value, exact, either in values:
        leaves = gradients(value, (z, w), one), gradients(exact, (z64, w64), one), either
        for g, t, step in zip(*leaves, strict=True):
            error, allowed = (g.double() - t).abs(), 1e-4 * max(1.0, scale) + 1e-4 * t.abs() + step
            assert (error <= allowed).all(), f"{error.max():.1e}, {(error / allowed).max():.1f} of what is allowed"


def total_variation_steps(z, w):
    """How far its gradients at both sides are off if float32 takes p > q for p < q, which it may where they are equal but
    for the rounding of t = log p - log q: one of z - w, one of the largest of each, and as for values near the reference.

    h = p sign(t) / 2, k = -q sign(t) / 2, and the gradients are h - p sum h and k - q sum k.
    """
    p, q = z.softmax(-1), w.softmax(-1)
    apart = (z - w).abs() + (z.amax(-1, keepdim=True) - w.amax(-1, keepdim=True)).abs()
    unsure = (z.log_softmax(-1) - w.log_softmax(-1)).abs() <= ULP * (8 + apart)
    return [x * unsure + x * (x * unsure).sum(-1, keepdim=True) for x in (p, q)]


def test_rows_that_rise_late(backend, device):
    """The running shift moves many times, and the sides need shifts of their own."""
    v = torch.arange(20000, device=device, dtype=torch.float32)
    z = torch.stack([v / 50, -v / 50, torch.where(v > 19990, 300.0, 0.0), v * 0]) + torch.randn(4, 20000, device=device)
    w = torch.stack([-v / 50, -v / 50, torch.where(v < 10, 300.0, 0.0), v / 100]) + torch.randn(4, 20000, device=device)
    y = torch.tensor([19999, 0, 19999, 7], device=device)
    names = ["reverse_kl", "forward_kl", "alpha", "squared_hellinger", "js"]
    ours = fl.token_stats(z, y, w, divergence=names, entropy=True, shift=False)
    truth = fl.reference.token_stats(z.double(), y, w.double(), divergence=names, entropy=True, shift=False)
    for name, value in outputs(truth).items():
        torch.testing.assert_close(outputs(ours)[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)


def test_power_sums_that_outgrow_every_shift(backend, device):
    """Terms p^2/q far above both maxima, met before the row's maximum; and sums that are infinite."""
    z, w = torch.full((1, 8192), -5.0, device=device), torch.zeros(1, 8192, device=device)
    z[0, 5], w[0, 5], z[0, 8000] = 0.0, -100.0, 60.0
    y = torch.zeros(1, dtype=torch.long, device=device)
    truth = divergences.get("pearson_chi2").define(z.double().log_softmax(-1), w.double().log_softmax(-1))
    ours = fl.token_stats(z, y, w, divergence="pearson_chi2", shift=False).divergence["pearson_chi2"]
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)
    z, w = torch.randn(1, 6, device=device), torch.randn(1, 6, device=device)
    w[0, 3] = -1e4
    for label in (0, 3):
        stats = fl.token_stats(
            z, y + label, w, divergence=["pearson_chi2", "squared_hellinger"], shift=False
        ).divergence
        assert stats["pearson_chi2"].item() == INF and 0 < stats["squared_hellinger"].item() < 1


@pytest.mark.parametrize("low", [-1e9, -65504.0, -1e4])
def test_label_among_tokens_masked_by_a_large_number(backend, device, low):
    """A top-k teacher: the label's own logit is an outlier on one side, and must not spoil the rest of the row."""
    z, w = logits((2, 301), device, spread=0.3)
    with torch.no_grad():
        w[:, 200:] = low
    y = torch.tensor([250, 7], device=device)
    names = [n for n in NAMES if n not in ("reverse_kl", "jeffreys", "pearson_chi2")]
    z64, w64 = double(z), double(w)
    ours = fl.token_stats(z, y, w, divergence=names, shift=False).divergence
    truth = fl.reference.token_stats(z64, y, w64, divergence=names, shift=False).divergence
    one = torch.ones(2, device=device)
    for name in names:
        assert relative(ours[name], truth[name]) <= 1e-5, name
        if any(t.isnan().any() for t in gradients(truth[name], (z64, w64), one)):
            del ours[name], truth[name]
    for what, error in gradient_errors(ours, truth, (z, w), (z64, w64)):
        assert error <= 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("offset", [-60.0, -100.0, -200.0, 300.0])
def test_first_column_is_an_outlier_and_the_sides_lie_apart(backend, device, offset):
    """The row cannot be centred on column 0, nor the sides' shifts be tied about it: nothing may underflow."""
    z, w = logits((3, 70), device)
    with torch.no_grad():
        z += offset
        z[:, 0], w[:, 0] = -400.0, -400.0
    y = torch.tensor([1, 40, 0], device=device)
    ours = fl.token_stats(z, y, w, entropy=True, shift=False)
    truth = fl.reference.token_stats(double(z), y, double(w), entropy=True, shift=False)
    for name, value in outputs(truth).items():
        torch.testing.assert_close(outputs(ours)[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)


def test_nan_is_not_hidden(backend, device):
    z, w = logits((3, 70), device)
    with torch.no_grad():
        z[0, 33], w[1, 44] = math.nan, math.nan
    y = torch.zeros(3, dtype=torch.long, device=device)
    stats = fl.token_stats(z, y, w, divergence=NAMES, entropy=True, collision=True, shift=False)
    for x in (stats.logps, stats.entropy, stats.collision):
        assert x.isnan().tolist() == [True, False, False]
    assert stats.ref_logps.isnan().tolist() == [False, True, False]
    for name, value in stats.divergence.items():
        assert value.isnan().tolist() == [True, True, False], name


def test_a_row_without_any_token_is_nan_with_zero_gradient(backend, device):
    z, _ = logits((2, 30), device)
    with torch.no_grad():
        z[0] = -INF
    stats = fl.token_stats(z, torch.zeros(2, dtype=torch.long, device=device), shift=False)
    assert stats.logps.isnan().tolist() == [True, False]
    (g,) = torch.autograd.grad(stats.logps[1], z)
    assert not g[0].any()


@pytest.mark.parametrize("key", ["js(beta=0.001)", "js(beta=0.999)", "alpha(a=0.01)", "alpha(a=0.99)", "alpha_beta(a=1.5, b=2)",
                                 "skew_forward_kl(lam=0.99)", "skew_reverse_kl(lam=0.001)"])  # fmt: skip
def test_parameters_near_their_ends(backend, device, key):
    # So many rows that eager's error, to which ours is compared, is not small by chance.
    z, w = logits((16, 333), device)
    z64, w64 = double(z), double(w)
    y = torch.zeros(16, dtype=torch.long, device=device)
    (ours,) = fl.token_stats(z, y, w, divergence=key, shift=False).divergence.values()
    (eager,) = fl.reference.token_stats(z, y, w, divergence=key, shift=False).divergence.values()
    (truth,) = fl.reference.token_stats(z64, y, w64, divergence=key, shift=False).divergence.values()
    # The value is a small difference, by a factor that depends on the parameter: eager code shows how small.
    assert relative(ours, truth) <= max(1e-5, 2 * relative(eager, truth))
    one = torch.ones(16, device=device)
    found, theirs, exact = (gradients(x, i, one) for x, i in ((ours, (z, w)), (eager, (z, w)), (truth, (z64, w64))))
    for g, e, t in zip(found, theirs, exact, strict=True):
        assert relative(g, t) <= max(1e-5, 2 * relative(e, t))
