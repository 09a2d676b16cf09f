"""topk_distillation_loss: against the whole vocabulary, closed-form gradients, heads and dtypes, entries that are not there."""

import math

import pytest
import torch
from helpers import double, doubles, gradients_of, hidden_leaves, hidden_source, labels_for, logits, relative

import fused_losses as fl
from fused_losses.core.batch import CallOptions, token_batch
from fused_losses.engine import hidden_at, logits_at

pytestmark = pytest.mark.usefixtures("one_thread")

V, K = 23, 4
TAILS = ["bucket", "renormalise", "ignore"]
KINDS = ["forward_kl", "reverse_kl", "js(beta=0.3)"]
Y = torch.tensor([[3, -100, 7, 0], [22, 5, -100, 11]])


def teacher(device, k=K, lead=(2, 4), vocab=V):
    q = (torch.randn(*lead, vocab, device=device) * 2).log_softmax(-1)
    logps, ids = q.topk(k, -1)
    return q, logps, ids


MORE = ["jeffreys", "total_variation", "skew_forward_kl", "alpha"]


WHOLE = [(t, k) for t in TAILS for k in [*KINDS, *MORE] if t != "ignore" or k in KINDS]


# The tail is plain torch, as the divergence of the K tokens is: in the interpreter, which the other side of the comparison
# needs for each divergence, the tails take turns.
@pytest.mark.parametrize(
    ("backend", "tail", "kind"),
    [("torch", *case) for case in WHOLE]
    + [
        ("triton", TAILS[i % len(TAILS)] if kind in KINDS else "bucket", kind) for i, kind in enumerate([*KINDS, *MORE])
    ],
    indirect=["backend"],
)
def test_all_tokens_are_the_whole_vocabulary(backend, device, tail, kind):
    """K = V, in any order: distillation_loss."""
    z, _ = logits((2, 4, V), device)
    y = Y.to(device)
    q, logps, ids = teacher(device, V)
    out = fl.topk_distillation_loss(z, y, logps, ids, tail=tail, divergence=kind, hard=0.3, shift=False)
    whole = fl.distillation_loss(z, y, q, divergence=kind, hard=0.3, shift=False)
    assert relative(out.loss, whole.loss) <= 1e-5
    assert relative(torch.autograd.grad(out.loss, z)[0], torch.autograd.grad(whole.loss, z)[0]) <= 1e-5
    assert out.metrics["topk_mass"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", TAILS)
def test_gradient_in_closed_form(monkeypatch, tail, kind):
    """With w = dD/dp', dD/dz = p' (w - <p', w>) inside the K tokens; a bucket hands p_v / p_tail of its share to each of its
    tokens; ignored tokens only feel the normaliser."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z = torch.randn(1, V, dtype=torch.float64, requires_grad=True)
    q, logps, ids = teacher("cpu", lead=(1,))
    logps, p = logps.double(), z.detach().softmax(-1)
    pk, qk = p.gather(-1, ids), logps.exp()
    inside = torch.zeros(1, V, dtype=torch.bool).scatter(-1, ids, True)
    share = torch.ones_like(p)
    if tail == "bucket":
        rest = 1 - pk.sum(), 1 - qk.sum()
        share = torch.where(inside, 1, p / rest[0])
        pk, qk = torch.cat([pk, rest[0].view(1, 1)], -1), torch.cat([qk, rest[1].view(1, 1)], -1)
    if tail == "renormalise":
        pk, qk = pk / pk.sum(), qk / qk.sum()
    h = pk * ((pk / qk).log() + 1) if kind == "reverse_kl" else -qk  # dD/dlog p'
    value = (pk * (pk / qk).log()).sum() if kind == "reverse_kl" else (qk * (qk / pk).log()).sum()
    at = torch.zeros(1, V, dtype=torch.float64).scatter(-1, ids, h[:, :K])
    if tail == "bucket":
        expected = at + torch.where(inside, 0, h[:, K:] * share) - p * h.sum()
    elif tail == "renormalise":
        expected = at - torch.zeros_like(p).scatter(-1, ids, pk) * h.sum()
    else:
        expected = at - p * h.sum()
    out = fl.topk_distillation_loss(z, torch.tensor([2]), logps, ids, tail=tail, divergence=kind, shift=False)
    assert out.loss.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z)[0], expected, rtol=1e-9, atol=1e-12)


def test_known_values(monkeypatch):
    """Student (1/2, 1/4, 1/8, 1/8), teacher (1/4, 1/2, ...): sums by hand."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    logps, ids = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log(), torch.tensor([[1, 0]])
    call = lambda **o: fl.topk_distillation_loss(z, torch.tensor([0]), logps, ids, **o, shift=False).loss.item()  # noqa: E731
    log2 = math.log(2)
    for kind in ("forward_kl", "reverse_kl"):
        assert call(divergence=kind) == pytest.approx(log2 / 4, rel=1e-12)  # buckets of 1/4 on both sides
        assert call(tail="ignore", divergence=kind) == pytest.approx(log2 / 4, rel=1e-12)
        assert call(tail="renormalise", divergence=kind) == pytest.approx(log2 / 3, rel=1e-12)
    assert call(tail="ignore", hard=1.0, soft=0.0) == pytest.approx(log2, rel=1e-12)
    short = fl.topk_distillation_loss(z, torch.tensor([0]), logps[:, 1:], ids[:, 1:], tail="ignore", shift=False)
    assert short.loss.item() == pytest.approx(-log2 / 4, rel=1e-12)  # of a part of the tokens: no divergence
    assert short.metrics["topk_mass"].item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shift", [False, True])
def test_from_hidden_states_with_every_option_of_a_head(monkeypatch, tail, shift):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    monkeypatch.setattr(hidden_at, "BYTES", 1)  # a row at a time
    leaves = hidden_leaves((2, 4), 6, V + 3, "cpu", rank=2)
    head = {"softcap": 5.0, "scale": 0.7, "temperature": 1.3, "valid_vocab": V}
    q, logps, ids = teacher("cpu", lead=(2, 3) if shift else (2, 4))
    options = {"tail": tail, "shift": shift, "hard": 0.5, "divergence": "js", "entropy": True}

    def loss(f, leaves, **how):
        return f.topk_distillation_loss(hidden_source(leaves, **head), Y, logps, ids, **options, **how)

    wide = doubles(leaves)
    ours, truth = loss(fl, leaves, plan="vocab_chunks"), loss(fl.reference, wide)
    assert relative(ours.loss, truth.loss) <= 2e-6
    for g, t in zip(gradients_of(ours.loss, leaves), gradients_of(truth.loss, wide), strict=True):
        assert relative(g, t) <= 5e-6
    for name, x in truth.metrics.items():
        torch.testing.assert_close(ours.metrics[name].double(), x, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("wanted", range(5))
def test_one_tensor_of_the_head_wants_a_gradient(monkeypatch, wanted):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = [x.detach() for x in hidden_leaves((2, 4), 6, V, "cpu", rank=2)]
    leaves[wanted].requires_grad_()
    q, logps, ids = teacher("cpu")
    loss = lambda f, x: f.topk_distillation_loss(hidden_source(x), Y, logps, ids, shift=False).loss  # noqa: E731
    wide = doubles(leaves)
    (g,), (t,) = gradients_of(loss(fl, leaves), leaves), gradients_of(loss(fl.reference, wide), wide)
    assert relative(g, t) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_low_precision_is_never_worse_than_eager(device, tail, dtype, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton" if device.type != "cpu" else "torch")
    z, _ = logits((2, 4, V), device, dtype)
    q, logps, ids = teacher(device)
    loss = lambda f, z: f.topk_distillation_loss(z, Y.to(device), logps, ids, tail=tail, hard=0.1, shift=False).loss  # noqa: E731
    z64 = double(z)
    ours, eager, truth = loss(fl, z), loss(fl.reference, z), loss(fl.reference, z64)
    assert relative(ours, truth) <= max(1e-5, relative(eager, truth))
    (g,), (e,), (t,) = (torch.autograd.grad(x, leaf) for x, leaf in ((ours, z), (eager, z), (truth, z64)))
    assert g.dtype == dtype and relative(g, t) <= max(relative(e, t), torch.finfo(dtype).eps / 2)


def test_half_precision_hidden_states(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = hidden_leaves((2, 4), 6, V, "cpu", rank=2, dtype=torch.bfloat16)
    q, logps, ids = teacher("cpu")
    loss = lambda f, x: f.topk_distillation_loss(hidden_source(x), Y, logps, ids, shift=False).loss  # noqa: E731
    wide = doubles(leaves)
    ours, truth = loss(fl, leaves), loss(fl.reference, wide)
    assert relative(ours, truth) <= 1e-5
    for g, t in zip(gradients_of(ours, leaves), gradients_of(truth, wide), strict=True):
        assert g.dtype == torch.bfloat16 and relative(g, t) <= 2**-7


def test_gradients_of_all_statistics(backend, device):
    """What else is made of the same pass is differentiable too, and ids may repeat."""
    z, _ = logits((2, 4, V), device)
    ids = torch.randint(0, 6, (2, 4, 8), device=device)
    y = torch.where(Y > 5, 1, Y).to(device)
    ids[..., 3] = y.clamp(min=0)
    keep = torch.rand(ids.shape, device=device) < 0.8
    weights = [torch.randn(ids.shape, device=device), *torch.randn(3, 2, 4, device=device)]
    labels, options = token_batch(y, shift=False, ignore_index=-100), CallOptions(entropy=True)
    stats, at, _ = logits_at.stats_at(fl.Logits(z, softcap=4.0, temperature=0.7), labels, ids, keep, options)
    total = sum((w * x).sum() for w, x in zip(weights, (at, stats.logps, stats.lse, stats.entropy), strict=True))
    z64 = double(z)
    twin = fl.reference.token_stats(fl.Logits(z64, softcap=4.0, temperature=0.7), y, entropy=True, shift=False)
    there = (4 * torch.tanh(z64 / 4) / 0.7).gather(-1, ids) * (keep & (y != -100).unsqueeze(-1))
    torch.testing.assert_close(at.double(), there, rtol=1e-5, atol=1e-6)
    truth = sum((w * x).sum() for w, x in zip(weights, (there, twin.logps, twin.lse, twin.entropy), strict=True))
    assert relative(torch.autograd.grad(total, z)[0], torch.autograd.grad(truth, z64)[0]) <= 1e-6


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_entries_that_are_not_there(monkeypatch, source, tail):
    """-inf fills up: with any id, be it one that is there already."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = hidden_leaves((2, 4), 6, V, "cpu")
    if source == "logits":
        leaves = [(leaves[0] @ leaves[1].T).detach().requires_grad_()]
    made = lambda x: fl.Logits(x[0]) if source == "logits" else hidden_source([*x, None, None])  # noqa: E731
    leaves = leaves[:3]
    q, logps, ids = teacher("cpu")
    more = torch.full((2, 4, 2), -math.inf)
    filled = torch.cat([logps, more], -1), torch.cat([ids, ids[..., :1], torch.full_like(ids[..., :1], -7)], -1)
    for options in ({"divergence": "js"}, {"divergence": "reverse_kl"}):
        plain = fl.topk_distillation_loss(made(leaves), Y, logps, ids, tail=tail, **options, shift=False).loss
        padded = fl.topk_distillation_loss(made(leaves), Y, *filled, tail=tail, **options, shift=False).loss
        torch.testing.assert_close(padded, plain)
        for g, e in zip(gradients_of(padded, leaves), gradients_of(plain, leaves), strict=True):
            torch.testing.assert_close(g, e)
    nothing = fl.topk_distillation_loss(made(leaves), Y, torch.full_like(logps, -math.inf), ids, tail=tail, shift=False)
    assert nothing.loss.abs() <= 1e-5 and nothing.metrics["topk_mass"] == 0
    assert all(g is None or g.isfinite().all() for g in gradients_of(nothing.loss, leaves))


@pytest.mark.parametrize("tail", TAILS)
def test_extremes_stay_finite(backend, device, tail):
    """A teacher or student that is sure of the K tokens, a student that is sure of others, a suppressed token."""
    for sure in ([0, 40.0], [40.0, 0], [-300.0, 300.0]):
        z = torch.zeros(1, 8, device=device)
        z[:, :2], z[:, 6:] = sure[0], sure[1]
        z[:, 7] = -math.inf
        z.requires_grad_()
        for q in (0.5, 0.5 - 1e-9, 1e-9):
            logps = torch.tensor([[q, q]], device=device).log()
            for kind in KINDS:
                ids = torch.tensor([[0, 1]], device=device)
                out = fl.topk_distillation_loss(
                    z, torch.tensor([1], device=device), logps, ids, tail=tail, divergence=kind, shift=False
                )
                g = torch.autograd.grad(out.loss, z)[0]
                assert out.loss.isfinite() and g.isfinite().all() and g[0, 7] == 0, (sure, q, kind)


def test_nothing_counts(backend, device, poison):
    q, logps, ids = teacher(device)
    logps, ids = logps.clone(), ids.clone()
    logps[0], ids[0] = math.nan, 1 << 30
    z, _ = logits((2, 4, V), device)
    with torch.no_grad():
        z[0] = math.nan
    for y in (Y.clone().to(device), torch.full_like(Y, -100).to(device)):
        y[0] = -100
        out = fl.topk_distillation_loss(z, y, logps, ids, hard=0.1, shift=False)
        g = torch.autograd.grad(out.loss, z)[0]
        assert out.loss.isfinite() and g.isfinite().all() and not g[0].any()
        assert (out.loss == 0) == bool((y == -100).all())
    x, weight, *_ = hidden_leaves((2, 4), 6, V, device)
    with torch.no_grad():
        x[0] = math.nan
    y[1, 2] = 3
    out = fl.topk_distillation_loss(fl.Hidden(x, weight), y, logps, ids, static_shapes=False, shift=False)
    for g in torch.autograd.grad(out.loss, (x, weight)):
        assert g.isfinite().all()


def test_micro_batches_and_packed_rows(backend, device):
    z, _ = logits((2, 4, V), device)
    y = Y.to(device)
    q, logps, ids = teacher(device)
    whole = torch.autograd.grad(fl.topk_distillation_loss(z, y, logps, ids, shift=False).loss, z)[0]
    parts = [fl.topk_distillation_loss(z[i], y[i], logps[i], ids[i], num_items=6, shift=False).loss for i in (0, 1)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), z)[0], whole)
    cu = torch.tensor([0, 4, 8], device=device)
    packed = fl.topk_distillation_loss(
        z.flatten(0, 1), y.flatten(), logps.flatten(0, 1), ids.flatten(0, 1), shift=True, cu_seqlens=cu
    )
    padded = fl.topk_distillation_loss(z, y, logps[:, :-1], ids[:, :-1].int(), shift=True)
    torch.testing.assert_close(packed.loss, padded.loss)
    none = fl.topk_distillation_loss(z, y, logps, ids, reduction="none", shift=False).loss
    assert none.shape == y.shape and not none[y == -100].any()


def test_strides_and_gradient_in_place(backend, device):
    q, logps, ids = teacher(device)
    big, _ = logits((3, 5, 2 * V), device)
    y = Y.to(device)
    inner = big[:2, 1:, :V]
    expected = torch.autograd.grad(fl.topk_distillation_loss(inner.contiguous(), y, logps, ids, shift=False).loss, big)[
        0
    ]
    loss = fl.topk_distillation_loss(inner, y, logps, ids, shift=False).loss
    torch.testing.assert_close(torch.autograd.grad(loss, big)[0], expected)
    held = inner.contiguous() * 1
    held.retain_grad()
    fl.topk_distillation_loss(held, y, logps, ids, inplace_backward=True, shift=False).loss.backward()
    torch.testing.assert_close(held.grad, expected[:2, 1:, :V])


def test_memory_of_hidden_states_is_bounded():
    """Rows of the head that are gathered at once: never those of all tokens."""
    seen = []
    ids = torch.randint(0, V, (50, K))
    x, weight = torch.randn(50, 6), torch.randn(V, 6)
    keep, inputs = torch.ones_like(ids, dtype=torch.bool), hidden_at.Inputs(x, weight)
    rows = hidden_at._Gathered(hidden_at.HiddenAtArgs(ids, keep, 0.0, 1.0, inputs, vocab=V))
    for r, part, gathered in rows.blocks():
        seen.append((r.stop - r.start, gathered.numel() * 4))
        assert len(part) == len(gathered)
    assert sum(n for n, _ in seen) == 50 and max(b for _, b in seen) <= hidden_at.BYTES


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_overlap_by_hand(own_backend, kind, shift):
    """As verl counts it: one token after another, in sets."""
    x, weight, w = torch.randn(3, 6, 8), torch.randn(V, 8), torch.randn(3, 6, V)
    y = labels_for((3, 6), V, "cpu")
    logq, ids = w.log_softmax(-1).topk(K)
    logq[1, 2, 1:] = -torch.inf
    (logq, ids) = (t[:, :-1] if shift else t for t in (logq, ids))
    policy = fl.Hidden(x, weight) if kind == "hidden" else x @ weight.T
    found = fl.topk_overlap(policy, y, logq, ids, shift=shift)
    logp = (x @ weight.T).double().log_softmax(-1)
    mask = (y[:, 1:] if shift else y) != -100
    for at in range(mask.shape[1] * 3):
        s, t = divmod(at, mask.shape[1])
        here = [(int(v), float(q)) for v, q in zip(ids[s, t], logq[s, t], strict=True) if q != -math.inf and mask[s, t]]
        own = set(logp[s, t].topk(K).indices.tolist())
        both = [(v, q) for v, q in here if v in own]
        assert found.overlap[s, t] == len(both)
        masses = sum(math.exp(logp[s, t, v]) for v, _ in here), sum(math.exp(q) for _, q in here)
        gain = sum(math.exp(q) * (q - float(logp[s, t, v])) for v, q in both) / max(1, len(both))
        mine = found.student_mass[s, t], found.teacher_mass[s, t], found.advantage[s, t]
        assert [float(m) for m in mine] == pytest.approx([*masses, gain], rel=1e-4, abs=1e-6)


def test_once():
    z = torch.randn(3, V, requires_grad=True)
    q, logps, ids = teacher("cpu", lead=(3,))
    loss = fl.topk_distillation_loss(z, torch.tensor([1, 2, 3]), logps, ids, shift=False).loss
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="token_stats can be differentiated once"):
        g.sum().backward()


Z, Q, I = torch.zeros(2, 4, V), torch.full((2, 4, K), -2.0), torch.arange(K).expand(2, 4, K)
call = fl.topk_distillation_loss
BAD = [
    (lambda: call(Z, Y, Q, I, tail="drop", shift=False), ValueError,
     "tail: expected one of bucket, renormalise, ignore, got 'drop'"),
    (lambda: call(Z, Y, Q, I, tail="ignore", divergence="alpha", shift=False), ValueError,
     "divergence: with tail='ignore' expected"),
    (lambda: call(Z, Y, Q, I, divergence="kl", shift=False), ValueError, "unknown name 'kl'"),
    (lambda: call(Z, Y, Q[..., 0], I, shift=False), ValueError,
     r"topk_logps: expected \[2, 4, K\] for \[2, 4\] tokens, got \[2, 4\]"),
    (lambda: call(Z, Y, Q, I[..., :2], shift=False), ValueError, "topk_logps: expected"),
    (lambda: call(Z, Y, Q, I, shift=True), ValueError, r"topk_logps: expected \[2, 3, K\]"),
    (lambda: call(Z, Y, Q.long(), I, shift=False), TypeError, "topk_logps: expected a float tensor, got torch.int64"),
    (lambda: call(Z, Y, Q, Q, shift=False), TypeError, "topk_ids: expected a int32 or int64 tensor, got torch.float32"),
    (lambda: call(Z, Y, Q, I + V - 2, shift=False), ValueError, rf"ids: expected tokens in \[0, {V}\), got {V}"),
    (lambda: call(fl.LogProbs(Z[..., 0]), Y, Q, I, shift=False), ValueError, "student: expected fl.Hidden or logits"),
    (lambda: call(Z, Y, Q, I, hard=-1, shift=False), ValueError, "hard: expected a finite number >= 0"),
    (lambda: call(Z, Y, Q, I, reduction="avg", shift=False), ValueError, "reduction: expected"),
    (lambda: call(Z, Y, Q, I, plan="vocab_chunks", shift=False), ValueError,
     "plan, workspace, static_shapes: are for fl.Hidden"),
    (lambda: call(Z, Y, Q, I, beta=0.5, shift=False), TypeError, "beta"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    attempt, error, words = BAD[case]
    with pytest.raises(error, match=words):
        attempt()
