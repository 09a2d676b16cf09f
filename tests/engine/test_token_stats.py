"""token_stats on both backends against the float64 twin: values, gradients, dtypes, layouts, options, empty input."""

import math

import pytest
import torch
from helpers import (
    EPS,
    ULP,
    check_collision,
    compare,
    double,
    gradients,
    labels_for,
    logits,
    outputs,
    promised,
    relative,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fused_losses as fl
from fused_losses import divergences

NAMES = divergences.names()
EVERYTHING = {"divergence": NAMES, "entropy": True, "collision": True}


def fp32(kind):
    return 1e-5


@pytest.mark.parametrize(
    "shape", [(1, 2), (7, 777), (3, 8193)], ids=str
)  # least; one masked step; full steps and a tail
def test_float32_matches_the_twin(backend, device, shape, poison):
    z, w = logits(shape, device)
    compare(z, w, labels_for(shape[:1], shape[1], device), fp32, **EVERYTHING)


@pytest.mark.parametrize("name", NAMES)
def test_each_divergence_alone(backend, device, name):
    z, w = logits((5, 301), device)
    compare(z, w, labels_for((5,), 301, device), fp32, divergence=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*NAMES, None])
def test_low_precision_is_never_worse_than_eager(backend, device, name, dtype):
    """Values and gradients against what eager torch loses in the same dtype; one rounding of the gradient is free."""
    z, w = logits((6, 515), device, dtype)
    y = labels_for((6,), 515, device)
    options = {"divergence": name, "entropy": True, "collision": True}
    ours, eager = (
        fl.token_stats(z, y, w, **options, shift=False),
        fl.reference.token_stats(z, y, w, **options, shift=False),
    )
    z64, w64 = double(z), double(w)
    truth = fl.reference.token_stats(z64, y, w64, **options, shift=False)
    check_collision(ours, truth, 1e-6)
    truth = outputs(truth)
    # The interpreter truncates float32 -> bfloat16, which doubles the rounding.
    rounding = EPS[dtype] * (2.1 if dtype == torch.bfloat16 and backend == "triton" and device.type == "cpu" else 1.0)
    for key, value in truth.items():
        mine, theirs = outputs(ours)[key], outputs(eager)[key]
        assert relative(mine, value) <= 1e-5 or relative(mine, value) <= relative(theirs, value), key
        weight = torch.randn(value.shape, device=device)
        exact = gradients(value, (z64, w64), weight)
        for g, e, t in zip(gradients(mine, (z, w), weight), gradients(theirs, (z, w), weight), exact, strict=True):
            assert relative(g, t) <= max(rounding, relative(e, t) if e.isfinite().all() else 0.0), key


def test_float64(device, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w = logits((4, 301), device, torch.float64)
    compare(z, w, labels_for((4,), 301, device), lambda kind: 1e-12, **EVERYTHING)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w = logits((3, 11), "cpu", torch.float64)
    y = labels_for((3,), 11, "cpu")
    fn = lambda z, w: tuple(outputs(fl.token_stats(z, y, w, **EVERYTHING, shift=False)).values())  # noqa: E731
    assert torch.autograd.gradcheck(fn, (z, w))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape_and_option(backend, device, data):
    """Sizes that no block divides, any divergence, padding, shift, masks and heads together."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    vocab = draw(st.integers(1, 1500))
    lead = draw(st.sampled_from([(), (1,), (5,), (2, 3)]))
    shift = bool(lead) and draw(st.booleans())
    widths = [vocab + draw(st.integers(0, 9)) for _ in range(2)]
    z, w = logits((*lead, widths[0]), device)[0], logits((*lead, widths[1]), device)[1]
    head = {"temperature": draw(st.sampled_from([1.0, 0.7])), "softcap": draw(st.sampled_from([None, 4.0]))}
    head["valid_vocab"] = vocab
    wrap = lambda x: fl.Logits(x, **head)  # noqa: E731
    y = labels_for(lead, vocab, device, masked=draw(st.booleans()))
    names = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
    sums = {name: draw(st.booleans()) for name in ("entropy", "collision")}
    compare(z, w, y, lambda kind: 3e-5, wrap=wrap, divergence=names, shift=shift, **sums)


HEADS = [
    {"softcap": 3.0}, {"scale": 0.25}, {"temperature": 0.7}, {"valid_vocab": 290},
    {"softcap": 5.0, "scale": 2.0, "temperature": 1.3, "valid_vocab": 299},
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_head_options(backend, device, head, side):
    v = head.get("valid_vocab", 301)
    z, _ = logits((5, 301 if side != "reference" else v), device)
    w, _ = logits((5, 301 if side != "policy" else v), device)
    plain = {}
    mine, other = (head if side != "reference" else plain), (head if side != "policy" else plain)
    compare(
        z,
        w,
        labels_for((5,), v, device),
        fp32,
        wrap=lambda x: fl.Logits(x, **mine),
        wrap_ref=lambda x: fl.Logits(x, **other),
        divergence=["forward_kl", "js", "alpha"],
        entropy=True,
        collision=True,
    )


def test_padding_of_different_widths(backend, device):
    """Padded columns take no probability and get zero gradient, whatever they hold."""
    z, w = logits((4, 120), device)[0], logits((4, 111), device)[1]
    with torch.no_grad():
        z[:, 100:], w[:, 100:] = 50.0, -3.0
    y = labels_for((4,), 100, device)
    wrap = lambda x: fl.Logits(x, valid_vocab=100)  # noqa: E731
    ours, _ = compare(z, w, y, fp32, wrap=wrap, **EVERYTHING)
    gz, gw = torch.autograd.grad(sum(x.sum() for x in outputs(ours).values()), (z, w))
    assert not gz[:, 100:].any() and not gw[:, 100:].any()


def views(device):
    base, other = logits((3, 6, 2, 64), device)
    yield "transposed vocabulary", base[0, 0].t().contiguous().t(), other[0, 0].t().contiguous().t()
    yield "sliced time", base[:, :-1, 0], other[:, :-1, 0]
    yield "every other row", base[:, ::2, 0], other[:, ::2, 0]
    yield "sliced vocabulary", base[:, 0, 0, :50], other[:, 1, 1, :50]
    yield "vocabulary stride 2", base[:, 0, 0, ::2], other[:, 0, 0, ::2]
    yield "permuted", base[:, :, 0].permute(1, 0, 2), other[:, :, 0].permute(1, 0, 2)
    yield (
        "three strides",
        base[::2, :-1, :1].expand(2, 5, 3, 64),
        other[::2, ::2][:, :, :].repeat(1, 2, 2, 1)[:, :5, :3],
    )
    yield "expanded batch", base[0, :, 0].expand(3, 6, 64), other[1:2, :, 0].expand(3, 6, 64)
    yield "expanded", base[0, 0, :1].expand(4, 64), other[0, :4, 1]


def test_strides(backend, device):
    """Any view, no copies asked of the caller: same numbers as on contiguous clones."""
    for what, z, w in views(device):
        y = labels_for(z.shape[:-1], z.shape[-1], device)
        y = y[:1].expand(y.shape) if what == "expanded batch" else y.t().contiguous().t() if y.dim() == 2 else y
        options = {"divergence": ["reverse_kl", "js"], "entropy": True, "collision": True}
        a = fl.token_stats(z, y, w, **options, shift=False)
        b = fl.token_stats(z.contiguous(), y.contiguous(), w.contiguous(), **options, shift=False)
        weight = torch.randn(y.shape, device=device)
        torch.testing.assert_close(a.collision, b.collision, rtol=1e-6, atol=1e-6, msg=what)
        for key, value in outputs(b).items():
            torch.testing.assert_close(outputs(a)[key], value, rtol=1e-6, atol=1e-6, msg=what)
        a, b = (gradients(sum(outputs(stats).values()), (z, w), weight) for stats in (a, b))
        for g, t in zip(a, b, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-6, atol=1e-6, msg=what)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3, 2)], ids=str)
def test_leading_shapes(backend, device, lead):
    z, w = logits((*lead, 65), device)
    ours, _ = compare(z, w, labels_for(lead, 65, device, masked=False), fp32, divergence="forward_kl", entropy=True)
    assert ours.logps.shape == torch.Size(lead) and ours.correct.dtype == torch.bool


def test_shift_is_the_causal_shift(backend, device, poison):
    z, w = logits((2, 4, 101), device)
    y = labels_for((2, 4), 101, device)
    inside = fl.token_stats(z, y, w, shift=True, **EVERYTHING)
    outside = fl.token_stats(z[:, :-1], y[:, 1:], w[:, :-1], **EVERYTHING, shift=False)
    weight = torch.randn(2, 3, device=device)
    assert torch.equal(inside.collision, outside.collision)
    for key, value in outputs(outside).items():
        assert torch.equal(outputs(inside)[key], value), key
    both = (gradients(sum(outputs(stats).values()), (z, w), weight) for stats in (inside, outside))
    for g, t in zip(*both, strict=True):
        assert torch.equal(g, t) and not g[:, -1].any()
    compare(z, w, y, fp32, shift=True, divergence="js")


def test_correct_is_the_argmax(backend, device):
    z, w = logits((50, 5), device)
    y = labels_for((50,), 5, device)
    expected = (z.argmax(-1) == y) & (y != -100)
    assert torch.equal(fl.token_stats(z, y, shift=False).correct, expected)
    tie = torch.zeros(2, 7, device=device)
    assert fl.token_stats(tie, torch.tensor([0, 6], device=device), shift=False).correct.all()


def test_collision_of_known_rows(backend, device):
    """log sum_v p_v^2: -log V where p is uniform, over the tokens that are not suppressed; 0 where one token is sure."""
    v = 5003
    rows = torch.zeros(5, v, device=device)
    rows[1] += 777.0
    rows[2, 100:] = -math.inf
    rows[3, 4000] = 200.0
    rows[4] = -300.0
    rows[4, 17], rows[4, 4000] = 0.0, -math.log(3)  # 3/4 and 1/4
    y = torch.tensor([0, 5, 99, 4000, 17], device=device)
    found = fl.token_stats(rows, y, collision=True, shift=False).collision
    sizes = torch.tensor([v, v, 100, 1, 1 / (9 / 16 + 1 / 16)], dtype=torch.float64, device=device)
    torch.testing.assert_close(found.double(), -sizes.log(), rtol=4 * EPS[torch.float32], atol=4 * EPS[torch.float32])
    with_ref = fl.token_stats(rows, y, rows.flip(1), collision=True, shift=False)
    torch.testing.assert_close(with_ref.collision, found)
    rows[0] = -math.inf
    assert fl.token_stats(rows, y, collision=True, shift=False).collision.isnan().tolist() == [True] + [False] * 4


def test_collision_where_the_sides_lie_apart(backend, device):
    """Shifts that are tied to the other side's must not let the squares underflow."""
    z = torch.randn(6, 3000, device=device)
    w = torch.randn(6, 3000, device=device)
    peaks = torch.tensor([0.0, 15.0, 25.0, 30.0, 45.0, 70.0], device=device)
    w[:, 7] += peaks
    w[:, 2900] += 1.5 * peaks
    z[:, 2000] += 4.0
    y = torch.randint(0, 3000, (6,), device=device)
    truth = fl.reference.token_stats(z.double(), y, collision=True, shift=False)
    for names in ((), ("reverse_kl", "alpha")):
        check_collision(fl.token_stats(z, y, w, divergence=names, collision=True, shift=False), truth, 1e-6)


def test_collision_changes_nothing_else(backend, device):
    """Neither values nor gradients; and it has no graph of its own."""
    z, w = logits((6, 1500), device)
    y = labels_for((6,), 1500, device)
    options = {"divergence": ["forward_kl", "alpha"], "entropy": True}
    a, b = (fl.token_stats(z, y, w, collision=on, **options, shift=False) for on in (False, True))
    assert a.collision is None and b.collision.grad_fn is None and not b.collision.requires_grad
    weight = torch.randn(6, device=device)
    for key, value in outputs(a).items():
        assert torch.equal(outputs(b)[key], value), key
        for g, t in zip(gradients(outputs(b)[key], (z, w), weight), gradients(value, (z, w), weight), strict=True):
            assert torch.equal(g, t), key


def test_incoming_gradients_of_any_stride(backend, device):
    z, w = logits((6, 99), device)
    stats = fl.token_stats(
        z, labels_for((6,), 99, device), w, divergence=["forward_kl", "js"], entropy=True, shift=False
    )
    for value in outputs(stats).values():
        (expanded,) = torch.autograd.grad(
            value, z, torch.ones((), device=device).expand(6), retain_graph=True, allow_unused=True
        )
        (plain,) = torch.autograd.grad(value, z, torch.ones(6, device=device), retain_graph=True, allow_unused=True)
        (strided,) = torch.autograd.grad(
            value, z, torch.ones(12, device=device)[::2], retain_graph=True, allow_unused=True
        )
        assert expanded is plain is None or (torch.equal(expanded, plain) and torch.equal(strided, plain))


def test_repeated_and_separate_backwards_add_up(backend, device):
    """Two losses on the same logits, one graph walked twice, and the same bits every time."""
    z, w = logits((6, 99), device)
    y = labels_for((6,), 99, device)
    stats = fl.token_stats(z, y, w, divergence="forward_kl", entropy=True, shift=False)
    a, b = stats.logps.sum(), (stats.divergence["forward_kl"] * 3 + stats.entropy).sum()
    first = torch.autograd.grad(a + b, z, retain_graph=True)[0]
    again = torch.autograd.grad(a + b, z, retain_graph=True)[0]
    parts = torch.autograd.grad(a, z, retain_graph=True)[0] + torch.autograd.grad(b, z)[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, parts)
    assert torch.equal(fl.token_stats(z, y, shift=False).logps, fl.token_stats(z, y, shift=False).logps)


def test_gradients_only_where_asked(backend, device):
    z, w = logits((4, 50), device)
    y = labels_for((4,), 50, device)
    stats = fl.token_stats(z, y, w.detach(), divergence="js", shift=False)
    stats.divergence["js"].sum().backward()
    assert z.grad is not None and w.grad is None and not stats.ref_logps.requires_grad
    stats = fl.token_stats(z.detach(), y, w, divergence="js", shift=False)
    stats.divergence["js"].sum().backward()
    assert w.grad is not None and not stats.logps.requires_grad
    with torch.no_grad():
        assert not fl.token_stats(z, y, w, divergence="js", shift=False).divergence["js"].requires_grad


def test_inplace_backward(backend, device):
    z, w = logits((5, 130), device)
    y = labels_for((5,), 130, device)
    options = {"divergence": ["forward_kl", "alpha"], "entropy": True}
    loss = lambda s: (s.logps + s.divergence["alpha"] + s.divergence["forward_kl"] - s.entropy).sum()  # noqa: E731
    expected = torch.autograd.grad(loss(fl.token_stats(z, y, w, **options, shift=False)), (z, w))
    copy = z.detach().clone().requires_grad_()
    held = copy * 1  # not a leaf, as logits from a head
    pointer = held.data_ptr()
    held.retain_grad()
    total = loss(fl.token_stats(held, y, w, inplace_backward=True, **options, shift=False))
    got = torch.autograd.grad(total, (held, w), retain_graph=True)
    assert got[0].data_ptr() == pointer
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, held)


@pytest.mark.parametrize("shape", [(0, 9), (0, 3, 9), (3, 0, 9)], ids=str)
def test_no_rows(backend, device, shape):
    z, w = logits(shape, device)
    stats = fl.token_stats(z, torch.zeros(shape[:-1], dtype=torch.long, device=device), w, **EVERYTHING, shift=False)
    sum(x.sum() for x in outputs(stats).values()).backward()
    assert z.grad.shape == z.shape and w.grad.shape == w.shape


@pytest.mark.parametrize("size", [2.0, 1e4])
def test_one_token_vocabulary(backend, device, size):
    """Its probability is 1 and a constant, whatever was rounded: no gradient but that of lse, and none to the reference."""
    z, w = ((torch.randn(3, 1, device=device) * size).requires_grad_() for _ in range(2))
    stats = fl.token_stats(z, torch.zeros(3, dtype=torch.long, device=device), w, **EVERYTHING, shift=False)
    apart = (z - w).abs().max().item()
    rounding = ULP * (8 + apart)  # of log p - log q, from which total variation follows
    for key, value in outputs(stats).items():
        truth = z.detach()[:, 0] if key == "lse" else torch.zeros(3, device=device)
        allowed = max(promised(key, apart), rounding) if key in NAMES else 0.0
        torch.testing.assert_close(value, truth, rtol=1.3e-6, atol=1e-5 + allowed, msg=key)
    for exact in (stats.logps, stats.ref_logps, stats.collision):
        assert torch.equal(exact, torch.zeros(3, device=device))
    given = {key: torch.randn(3, device=device) for key in outputs(stats)}
    total = sum((value * given[key]).sum() for key, value in outputs(stats).items())
    dz, dw = torch.autograd.grad(total, (z, w))
    assert torch.equal(dz[:, 0], given["lse"]) and not dw.any()


@pytest.mark.parametrize("plan", ["vocab_chunks", "frozen_head", "keep_logits"])
def test_one_token_vocabulary_from_hidden_states(backend, device, plan):
    """One row of the head is a token, the others are padding."""
    x, v = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device)
    weight, ref = v.clone().requires_grad_(plan != "frozen_head"), fl.Hidden(x.detach() + 1, v, valid_vocab=1)
    y = torch.zeros(4, dtype=torch.long, device=device)
    policy = fl.Hidden(x, weight, valid_vocab=1)
    stats = fl.token_stats(policy, y, ref, divergence=NAMES, entropy=True, plan=plan, shift=False)
    assert torch.equal(stats.logps, torch.zeros(4, device=device))
    values = {key: value for key, value in outputs(stats).items() if value.requires_grad and key != "lse"}
    total = sum((value * torch.randn(4, device=device)).sum() for value in values.values())
    for g in torch.autograd.grad(total, [t for t in (x, weight) if t.requires_grad]):
        assert not g.any()


def test_all_masked(backend, device, poison):
    z, w = logits((4, 33), device)
    stats = fl.token_stats(z, torch.full((4,), -100, device=device), w, **EVERYTHING, shift=False)
    for value in [*outputs(stats).values(), stats.collision]:
        assert torch.equal(value, torch.zeros(4, device=device))
    sum(x.sum() for x in outputs(stats).values()).backward()
    assert not z.grad.any() and not w.grad.any() and not stats.correct.any()


def test_one_valid_token_of_many(backend, device):
    z, w = logits((200, 65), device)
    y = torch.full((200,), -100, device=device)
    y[137] = 64
    ours, _ = compare(z, w, y, fp32, divergence="forward_kl")
    (g,) = torch.autograd.grad(ours.logps.sum(), z)
    assert g[137].any() and not g[:137].any() and not g[138:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_label_types(backend, device, dtype):
    z, _ = logits((4, 50), device)
    y = torch.tensor([0, 49, 7, 20], device=device)
    assert torch.equal(fl.token_stats(z, y.to(dtype), shift=False).logps, fl.token_stats(z, y, shift=False).logps)


def test_ignore_index_does_not_wrap_around(backend, device):
    z, _ = logits((1, 200), device)
    stats = fl.token_stats(
        z, torch.tensor([156], dtype=torch.uint8, device=device), shift=False
    )  # -100 as uint8 is 156
    assert stats.mask.all() and stats.logps.item() < 0


def test_labels_out_of_range(device, monkeypatch):
    z, _ = logits((3, 50), device)
    y = torch.tensor([1, 50, 2], device=device)
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    assert fl.token_stats(z, y, shift=False).logps.isnan().tolist() == [False, True, False]
    assert fl.token_stats(z, -y, shift=False).logps.isnan().tolist() == [True, True, True]
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 50\)"):
            fl.token_stats(z, y, shift=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 5 GB of GPU memory")
def test_more_than_2_to_the_31_elements(device):
    z = torch.zeros(17_000, 131_072, dtype=torch.bfloat16, device=device).requires_grad_()
    y = torch.zeros(17_000, dtype=torch.long, device=device)
    stats = fl.token_stats(z, y, shift=False)
    torch.testing.assert_close(stats.logps, torch.full_like(stats.logps, -(131_072.0**1)).fill_(-11.7835))
    stats.logps.sum().backward()
    assert z.grad[-1, 0] == 1


L = torch.zeros(3, dtype=torch.long)
X = torch.zeros(3, 5)
BAD = [
    (lambda: fl.token_stats([1.0], L, shift=False), TypeError, "policy: expected a tensor of logits"),
    (lambda: fl.token_stats(X.long(), L, shift=False), TypeError, "logits: expected float32"),
    (lambda: fl.token_stats(X, L.float(), shift=False), TypeError, "labels: expected integer token ids, got torch.float32"),
    (lambda: fl.token_stats(X, L[:2], shift=False), ValueError,
     r"policy: expected logits \[2, V\] for labels \[2\], got \[3, 5\]"),
    (lambda: fl.token_stats(X, L, X[:2], shift=False), ValueError, r"ref: expected logits"),
    (lambda: fl.token_stats(X, L, X.half(), divergence="js", shift=False), TypeError,
     "ref: expected torch.float32 as the policy has"),
    (lambda: fl.token_stats(X, L, torch.zeros(3, 6), divergence="js", shift=False), ValueError,
     "vocabulary of 5, got 6.*valid_vocab"),
    (lambda: fl.token_stats(X, L.to("meta"), shift=False), ValueError, "policy: expected logits on meta"),
    (lambda: fl.token_stats(X, L, divergence="js", shift=False), ValueError,
     "divergence: 'js' needs ref as fl.Hidden or logits, got None"),
    (lambda: fl.token_stats(X, L, fl.LogProbs(X[:, 0]), divergence="js", shift=False), ValueError, "got fl.LogProbs"),
    (lambda: fl.token_stats(X, L, fl.LogProbs(X), shift=False), ValueError, r"ref: expected fl.LogProbs \[3\].*got \[3, 5\]"),
    (lambda: fl.token_stats(fl.LogProbs(X[:, 0]), L, entropy=True, shift=False), ValueError,
     "policy: fl.LogProbs has no distribution"),
    (lambda: fl.token_stats(fl.LogProbs(X[:, 0]), L, collision=True, shift=False), ValueError,
     "policy: fl.LogProbs has .* collision"),
    (lambda: fl.token_stats(X[0], L[0], shift=True), ValueError, "shift: expected labels with a time dimension"),
    (lambda: fl.Logits(X, softcap=-1), ValueError, "softcap: expected a finite number > 0 or None, got -1"),
    (lambda: fl.Logits(X, temperature=0), ValueError, "temperature"),
    (lambda: fl.Logits(X, scale=float("nan")), ValueError, "scale"),
    (lambda: fl.Logits(X, valid_vocab=6), ValueError, r"valid_vocab: expected an int in \[1, 5\]"),
    (lambda: fl.Logits(torch.zeros(3, 0)), ValueError, "V >= 1"),
    (lambda: fl.token_stats(X.expand(3, 5)[:1].expand(3, 5), L, inplace_backward=True, shift=False), ValueError,
     "inplace_backward"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()


def test_backend_choice(monkeypatch):
    z, y = torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FUSED_LOSSES_BACKEND: expected one of triton, torch"):
        fl.token_stats(z, y, shift=False)
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    with pytest.raises(ValueError, match="float64 logits"):
        fl.token_stats(z.double().to("cuda") if torch.cuda.is_available() else z.double(), y.to(z.device), shift=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="cannot run on cpu tensors"):
        fl.token_stats(z, y, shift=False)
