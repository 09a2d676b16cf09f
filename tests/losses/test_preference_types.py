"""The loss types of preference_loss: published values, identities, options (several at once, LD-DPO, WPO), edge cases."""

import math

import pytest
import torch
from helpers import double, logits, products, relative

import fused_losses as fl
from fused_losses import divergences
from fused_losses.backends import torch_backend
from fused_losses.core import margin_losses
from fused_losses.core.options import SORTED, UNLINKED
from fused_losses.engine import evaluate, pair_ops

pytestmark = pytest.mark.usefixtures("one_thread")

LN2 = math.log(2)
MARGIN = ("cdpo", *margin_losses.TERMS)  # in the pair kernel
AT_H = {  # h_chosen = 0.7, h_rejected = -0.4, one token each, beta = 0.1
    "sigmoid": (0.639658918622423, {}),
    "cdpo": (0.650658918622423, {"label_smoothing": 0.1}),
    "robust": (0.6259089186224228, {"label_smoothing": 0.1}),
    "hinge": (0.89, {}),
    "exo_pair": (2.5729964552008333, {}),
    "discopop": (0.8702805321329449, {}),
    "ipo": (15.21, {}),
    "sigmoid_norm": (0.639658918622423, {}),
    "nca_pair": (1.3598129169370625, {}),
    "bco_pair": (1.3321067227767311, {}),
    "sppo_hard": (39.65, {}),
    "apo_zero": (0.9725084754536448, {}),
    "apo_down": (0.9900205533217961, {}),
    "aot": (0.639658918622423, {}),
    "aot_unpaired": (0.639658918622423, {}),
    "sft": (-0.7, {}),
}
AT_0 = {  # where the policy is the reference
    "hinge": 1.0, "ipo": 25.0, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2, "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": LN2 / 2 + 0.5,
}  # fmt: skip
SLOPES = {  # terms that have parameters -> values of these
    "sigmoid": [(0.2,)], "robust": [(0.2,)], "exo_pair": [(math.log(0.9), math.log(0.1))], "discopop": [(0.05,), (2.0,)],
}  # fmt: skip
SQUARES = {"ipo", "sppo_hard"}  # those of scores of e^80 are too large
SEVERAL = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}


def given(h, dtype=torch.float64, device="cpu"):
    """Log-ratios as log-probs of one token each, and labels."""
    x = torch.tensor(h, dtype=dtype, device=device).view(-1, 1)
    return x, torch.zeros(len(h), 1, dtype=torch.long, device=device)


def batch(pairs=3, length=6, vocab=23):
    """Sequences of 4 tokens, of 2, and of none."""
    z, w = logits((2 * pairs, length, vocab), "cpu", spread=0.3)
    y = torch.randint(0, vocab, (2 * pairs, length))
    y[:, :2] = -100
    y[0, 3] = y[4, 4:] = -100
    y[2] = -100
    return z, w, y


def pack(lengths, *tensors):
    """The first tokens of each row end to end, and the offsets."""
    rows = [[x[i, :n] for i, n in enumerate(lengths)] for x in tensors]
    return [torch.cat(x) for x in rows], torch.tensor([0, *lengths]).cumsum(0)


def compare(call, *leaves, tolerance=1e-5):
    """Value and gradients of call(library, *leaves) against those of the twin in float64."""
    exact = [double(x) for x in leaves]
    mine, truth = call(fl, *leaves), call(fl.reference, *exact)
    assert mine.loss.shape == truth.loss.shape and relative(mine.loss, truth.loss) <= tolerance
    unused = {"allow_unused": True, "materialize_grads": True}
    found, grads = (torch.autograd.grad(x.loss.sum(), at, **unused) for x, at in ((mine, leaves), (truth, exact)))
    for g, e in zip(found, grads, strict=True):
        assert relative(g, e) <= tolerance
    for name, x in truth.metrics.items():
        torch.testing.assert_close(mine.metrics[name].double(), x, rtol=1e-4, atol=1e-5, msg=name)
    return mine


@pytest.mark.parametrize("name", fl.losses.LOSSES)
def test_published_values(monkeypatch, name):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    value, options = AT_H[name]
    h, y = given([0.7, -0.4])
    for library in (fl, fl.reference):
        assert library.preference_loss(
            fl.LogProbs(h), y, None, loss_type=name, **options, shift=False
        ).loss.item() == pytest.approx(value, 1e-12)


LINKED = [
    (name, link)
    for name in sorted(set(fl.losses.LOSSES) - {"sft", "exo_pair"})
    for link in ("reverse_kl", "forward_kl", "js", "alpha(a=0.3)")
    if link == "reverse_kl" or name not in UNLINKED
]


@pytest.mark.parametrize(("name", "link"), LINKED)
def test_value_where_policy_is_reference(monkeypatch, name, link):
    """ln 2 unless said: scores are 0 there under every link."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    logps = torch.randn(4, 3, dtype=torch.float64)
    y = torch.zeros(4, 3, dtype=torch.long)
    y[1, 1:] = -100
    for library in (fl, fl.reference):
        out = library.preference_loss(
            fl.LogProbs(logps), y, fl.LogProbs(logps), loss_type=name, divergence=link, shift=False
        )
        assert out.loss.item() == pytest.approx(AT_0.get(name, LN2), rel=1e-12)


@pytest.mark.parametrize(("name", "params"), [(n, p) for n in margin_losses.TERMS for p in SLOPES.get(n, [()])])
def test_slope_of_a_term_is_its_derivative(name, params):
    m = torch.linspace(-6, 6, 98, dtype=torch.float64).requires_grad_()
    loss, slope = margin_losses.TERMS[name](m, *params)
    torch.testing.assert_close(slope, torch.autograd.grad(loss.sum(), m)[0], check_dtype=False)


def test_every_type_has_a_published_value():
    assert AT_H.keys() == fl.losses.LOSSES.keys()


@pytest.mark.parametrize("name", MARGIN)
def test_margin_losses_are_one_kernel(backend, device, monkeypatch, name):
    calls = []
    run = pair_ops.backend_module(backend).pair_forward
    monkeypatch.setattr(
        pair_ops.backend_module(backend), "pair_forward", lambda *x: (calls.append(x[0].term), run(*x))[1]
    )
    options = AT_H[name][1] | {"loss_type": name, "beta": 0.4, "divergence": "js", "reduction": "none"}
    y = torch.zeros(6, 3, dtype=torch.long, device=device)
    y[1, 1:] = -100
    p, q = (torch.randn(6, 3, device=device).requires_grad_() for _ in range(2))
    compare(
        lambda library, p, q: library.preference_loss(fl.LogProbs(p), y, fl.LogProbs(q), **options, shift=False), p, q
    )
    assert calls == [margin_losses.TERMS["sigmoid" if name == "cdpo" else name]]


@pytest.mark.parametrize("link", divergences.linkable())
@pytest.mark.parametrize("name", sorted(set(fl.losses.LOSSES) - UNLINKED - {"sft"}))
def test_every_loss_with_every_link(monkeypatch, name, link):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    y = torch.zeros(6, 3, dtype=torch.long)
    y[1, 1:], y[3, 2:] = -100, -100
    p, q = (torch.randn(6, 3).mul(0.5).requires_grad_() for _ in range(2))
    options = {"loss_type": name, "divergence": link, "beta": 0.3, "discopop_tau": 0.3}
    compare(
        lambda library, p, q: library.preference_loss(fl.LogProbs(p), y, fl.LogProbs(q), **options, shift=False), p, q
    )


def test_scores_that_enter_alone():
    """bco_pair at one log-ratio, for f' of the paper less f'(1)."""
    h, y = given([0.7, -0.4])
    ref = fl.LogProbs(torch.zeros_like(h))
    scores = {
        "forward_kl": lambda h: 1 - math.exp(-h), "js": lambda h: math.log(2 / (1 + math.exp(-h))),
        "alpha(a=0.3)": lambda h: (1 - math.exp(-0.3 * h)) / 0.3,
    }  # fmt: skip
    for link, s in scores.items():
        expected = math.log1p(math.exp(-0.1 * s(0.7))) + math.log1p(math.exp(0.1 * s(-0.4)))
        out = fl.preference_loss(fl.LogProbs(h), y, ref, loss_type="bco_pair", divergence=link, shift=False)
        assert out.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", fl.losses.LOSSES)
def test_extreme_ratios_stay_finite(backend, device, name):
    h, y = given([3000.0, -3000.0, 80.0, -3000.0, 3000.0, -80.0], torch.float32, device)
    ref = fl.LogProbs(torch.zeros_like(h))
    for link in ("reverse_kl",) if name in UNLINKED | SQUARES else ("reverse_kl", "forward_kl", "js"):
        for loss in (name, (name, "sft", "hinge")):
            x = h.clone().requires_grad_()
            out = fl.preference_loss(fl.LogProbs(x), y, ref, loss_type=loss, divergence=link, beta=1.0, shift=False)
            assert out.loss.isfinite() and torch.autograd.grad(out.loss, x)[0].isfinite().all(), (link, loss)


def test_discopop_does_not_overflow_where_its_parts_do():
    """c e^-m with e^-m infinite: c vanishes faster for tau < 1."""
    h, y = given([-60.0, 60.0], torch.float32)
    h.requires_grad_()
    out = fl.preference_loss(fl.LogProbs(h), y, None, loss_type="discopop", beta=1.0, shift=False)
    assert out.loss.item() == pytest.approx(120.0)
    assert torch.autograd.grad(out.loss, h)[0].flatten().tolist() == pytest.approx([-1.0, 1.0])


def test_ipo_takes_means_over_tokens(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    out = compare(lambda library, z, w: library.ipo_loss(z, y, w, beta=0.5, reduction="none", shift=False), z, w)
    assert torch.equal(
        out.loss, fl.preference_loss(z, y, w, loss_type="ipo", beta=0.5, reduction="none", shift=False).loss
    )
    p, q = (fl.token_stats(x, y, shift=False).logps.detach() for x in (z, w))
    mean = (p - q).sum(1) / (y != -100).sum(1).clamp(min=1)
    torch.testing.assert_close(out.loss.detach(), (mean[:3] - mean[3:] - 1).square())


def test_several_losses_are_a_weighted_sum(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    names = ("sigmoid", "hinge", "robust", "ipo", "apo_down", "sft")
    weights = (1.0, 0.5, 2.0, 0.25, 0.0, -1.0)
    options = {"divergence": "js", "beta": 0.7, "label_smoothing": 0.2}

    def call(library, z, w):
        return library.preference_loss(z, y, w, loss_type=names, loss_weights=weights, shift=False, **options)

    mine = compare(call, z, w).loss
    alone = [{k: x for k, x in options.items() if k != "label_smoothing" or n in ("sigmoid", "robust")} for n in names]
    parts = [fl.preference_loss(z, y, w, loss_type=n, **o, shift=False).loss for n, o in zip(names, alone, strict=True)]
    torch.testing.assert_close(mine, sum(x * part for x, part in zip(weights, parts, strict=True)))
    total = fl.preference_loss(z, y, w, loss_type=list(names), **options, shift=False).loss
    torch.testing.assert_close(total, sum(parts))


@pytest.mark.parametrize(
    ("loss", "kernels"), [(("sigmoid", "sft"), 1), (("sigmoid", "hinge"), 0), (("sft", "ipo"), 0)], ids=str
)
def test_sums_are_shared(monkeypatch, loss, kernels):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    calls, sums = [], []
    run, add = pair_ops.losses, evaluate.Tokens.log_ratios
    monkeypatch.setattr(pair_ops, "losses", lambda *x: (calls.append(x), run(*x))[1])
    monkeypatch.setattr(evaluate.Tokens, "log_ratios", lambda t: (sums.append(t), add(t))[1])
    z, w, y = batch()
    fl.preference_loss(z, y, w, loss_type=loss, shift=False)
    assert len(calls) == kernels and len(sums) == 2 - kernels  # one of them for the metrics


@pytest.mark.parametrize("shift", [False, True])
def test_sft_is_cross_entropy_of_chosen_tokens(monkeypatch, shift):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    out = fl.preference_loss(z, y, w, loss_type="sft", shift=shift)
    at, labels = (z[:3, :-1], y[:3, 1:]) if shift else (z[:3], y[:3])
    truth = torch.nn.functional.cross_entropy(at.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, truth)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z), torch.autograd.grad(truth, z))
    lengths = [6, 5, 0, 6, 4, 6]
    (pz, pw, py), cu = pack(lengths, z, w, y)
    short = y.clone()
    for i, n in enumerate(lengths):
        short[i, n:] = -100
    found = fl.preference_loss(pz, py, pw, loss_type="sft", shift=shift, cu_seqlens=cu).loss
    torch.testing.assert_close(found, fl.preference_loss(z, short, w, loss_type="sft", shift=shift).loss)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "aot", ("hinge", "sft", "bco_pair")], ids=str)
def test_ld_dpo_matches_the_twin(monkeypatch, loss, shift):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    options = {"loss_type": loss, "ld_alpha": 0.3, "shift": shift, "beta": 0.5}
    compare(lambda library, z, w: library.preference_loss(z, y, w, **options), z, w)
    (pz, pw, py), cu = pack([6, 5, 0, 6, 4, 6], *(x.detach() for x in (z, w, y)))
    leaves = [x.requires_grad_() for x in (pz, pw)]
    packed = options | {"cu_seqlens": cu}
    compare(lambda library, z, w: library.preference_loss(z, py, w, **packed), *leaves)


def test_ld_dpo_at_its_ends():
    """At 1 it is DPO, at 0 the longer response ends where the shorter does: after the tokens that count, not the positions."""
    p, q = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([[1, 1, 1, 1, 1], [-100, 1, -100, 1, 1], [-100, 1, 1, -100, -100], [1, 1, 1, 1, 1]])
    cut = torch.tensor(
        [[1, 1, -100, -100, -100], [-100, 1, -100, 1, 1], [-100, 1, 1, -100, -100], [1, 1, 1, -100, -100]]
    )
    call = lambda y, **o: fl.dpo_loss(fl.LogProbs(p), y, fl.LogProbs(q), reduction="none", shift=False, **o)  # noqa: E731
    torch.testing.assert_close(call(y, ld_alpha=1).loss, call(y).loss)
    torch.testing.assert_close(call(y, ld_alpha=0).loss, call(cut).loss)
    assert call(y, ld_alpha=0).metrics == call(cut).metrics != call(y).metrics
    assert call(y, ld_alpha=0.5).loss.ne(call(y).loss).all()


def test_published_wpo_weight(monkeypatch):
    """exp(log p_0 - log sum p^2) = 1.3866 of one token on each side; the other side is sure, and weighs 1."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z = torch.tensor([[[1, 0, -1, 0.5]], [[900.0, 0, 0, 0]]], dtype=torch.float64, requires_grad=True)
    y = torch.zeros(2, 1, dtype=torch.long)
    weighted, plain = (
        fl.preference_loss(z, y, None, loss_type="bco_pair", use_weighting=on, shift=False).loss for on in (True, False)
    )
    assert (weighted / plain).item() == pytest.approx(1.3865943362111943, rel=1e-12)
    torch.testing.assert_close(  # the weight has no gradient
        torch.autograd.grad(weighted, z)[0], 1.3865943362111943 * torch.autograd.grad(plain, z)[0]
    )


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", "sppo_hard", "sft", SEVERAL["loss_type"]], ids=str)
def test_wpo_matches_the_twin(monkeypatch, loss, shift):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    head = {"softcap": 5.0, "scale": 0.9, "temperature": 0.7, "valid_vocab": 20}
    y = y.clamp(max=19)
    options = {"loss_type": loss, "use_weighting": True, "shift": shift, "reduction": "none"}

    def call(library, z, w, y=y, **more):
        return library.preference_loss(fl.Logits(z, **head), y, fl.Logits(w, **head), **options, **more)

    compare(call, z, w)
    (pz, pw, py), cu = pack([6, 5, 0, 6, 4, 6], *(x.detach() for x in (z, w, y)))
    leaves = [x.requires_grad_() for x in (pz, pw)]
    compare(lambda library, z, w: call(library, z, w, py, cu_seqlens=cu), *leaves)


@pytest.mark.parametrize("plan", ["row_blocks", "vocab_chunks", "keep_logits", "frozen_head"])
def test_wpo_weights_come_from_the_same_pass(monkeypatch, plan):
    """No call and no product more than without them, in every plan the same loss and gradient."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    calls, forward = [], torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda *args: (calls.append(args), forward(*args)))
    fl.preference_loss(z, y, w, use_weighting=True, shift=False)
    assert len(calls) == 1
    x, weight, other = (torch.randn(4, 5, 6).requires_grad_(), torch.randn(19, 6), torch.randn(19, 6))
    weight.requires_grad_(plan != "frozen_head")
    y = torch.randint(0, 19, (4, 5))
    y[1, 3:], y[2, :2] = -100, -100
    ref = fl.Hidden(x.detach(), other)

    def step(library=fl, on=True, **how):
        loss = library.preference_loss(fl.Hidden(x, weight), y, ref, use_weighting=on, shift=False, **how).loss
        return loss, *torch.autograd.grad(loss, [t for t in (x, weight) if t.requires_grad])

    assert products(lambda: step(plan=plan)) == products(lambda: step(on=False, plan=plan))
    truth = step(fl.reference)
    for how in ({"plan": plan}, {"plan": "vocab_chunks", "workspace": 20_000}):
        for mine, theirs in zip(step(**how), truth, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": name} for name in sorted(set(fl.losses.LOSSES) - SORTED)),
        SEVERAL,
        {"ld_alpha": 0.4},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_row_blocks_give_the_same(monkeypatch, options, packed):
    """Blocks of one pair: what looks at the whole batch is known before."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, weight = torch.randn(8, 5, 4), torch.randn(19, 4)
    y = torch.randint(0, 19, (8, 5))
    y[1, 3:], y[4, :2], y[2] = -100, -100, -100
    if packed:
        (x, y), cu = pack([5, 4, 0, 5, 5, 5, 3, 5], x, y)
        options = options | {"cu_seqlens": cu}
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def call(library, x, weight):
        how = {"plan": "row_blocks", "workspace": 16_000} if library is fl else {}
        ref = fl.Hidden(x.detach(), weight.detach() * 0.8)
        return library.preference_loss(fl.Hidden(x, weight), y, ref, beta=0.5, **options, **how, shift=False)

    compare(call, x, weight)


def test_aot_pairs_ranks(monkeypatch):
    """Shuffling the chosen does not change aot_unpaired; shuffling pairs does not change aot."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    p, y = given([3.0, 1.0, 2.0, 0.5, -1.0, 0.0])
    q = torch.randn_like(p)

    def losses(name, order):
        sources = fl.LogProbs(p[order]), y, fl.LogProbs(q[order])
        return fl.preference_loss(*sources, loss_type=name, reduction="none", shift=False).loss

    torch.testing.assert_close(losses("aot_unpaired", [2, 0, 1, 3, 4, 5]), losses("aot_unpaired", list(range(6))))
    torch.testing.assert_close(losses("aot", [2, 0, 1, 5, 3, 4]), losses("aot", list(range(6))))
    summed = fl.preference_loss(fl.LogProbs(p), y, fl.LogProbs(q[:, 0]), loss_type="aot", shift=False).loss
    torch.testing.assert_close(
        summed, fl.preference_loss(fl.LogProbs(p), y, fl.LogProbs(q), loss_type="aot", shift=False).loss
    )
    free = fl.preference_loss(fl.LogProbs(p), y, None, loss_type="aot", reduction="none", shift=False).loss
    d = torch.tensor([2.0, 2.0, 2.5], dtype=torch.float64)
    torch.testing.assert_close(free, -torch.nn.functional.logsigmoid(0.1 * d))


@pytest.mark.parametrize(
    "options",
    [*({"loss_type": name} for name in fl.losses.LOSSES), {"use_weighting": True}, {"ld_alpha": 0.5}],
    ids=str,
)
def test_empty_sequences_and_batches(monkeypatch, options):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    y[[0, 3]] = -100
    out = fl.preference_loss(z, y, w, **options, shift=False)
    g = torch.autograd.grad(out.loss, z)[0]
    assert out.loss.isfinite() and g.isfinite().all() and not g[0].any() and not g[2].any()
    for shape in ((0, 5), (4, 0)):
        x, v = logits((*shape, 9), "cpu")
        out = fl.preference_loss(x, torch.zeros(shape, dtype=torch.long), v, **options, shift=False)
        assert out.loss.isfinite() and not torch.autograd.grad(out.loss, x)[0].any()
    none = fl.preference_loss(z, torch.full_like(y, -100), w, **options, shift=False)
    assert none.loss.isfinite() and not torch.autograd.grad(none.loss, z)[0].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "discopop"},
        {"loss_type": "nca_pair", "divergence": "js"},
        SEVERAL | {"ld_alpha": 0.5},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_compiles_without_graph_breaks(monkeypatch, options):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    z, w, y = batch()
    call = lambda z: fl.preference_loss(z, y, w, **options, shift=False).loss  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), call(z))
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z), torch.autograd.grad(call(z), z))


def test_second_derivative_is_an_error():
    h, y = given([0.7, -0.4])
    h.requires_grad_()
    ref = fl.LogProbs(torch.zeros_like(h))
    out = fl.preference_loss(fl.LogProbs(h), y, ref, loss_type="bco_pair", divergence="js", shift=False)
    (g,) = torch.autograd.grad(out.loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="preference_loss can be differentiated once"):
        g.sum().backward()


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
BAD = [
    ({"loss_type": "aot_pair"}, ValueError, "loss_type: unknown name 'aot_pair'; known: sigmoid, cdpo, .*sft"),
    ({"loss_type": ()}, ValueError, "loss_type: expected a name or a sequence of names, got none"),
    ({"loss_type": ("sigmoid", 3)}, ValueError, "loss_type: unknown name 3"),
    ({"loss_type": ("sigmoid", "sft"), "loss_weights": [1.0]}, ValueError, "loss_weights: expected 2 finite numbers"),
    ({"loss_weights": [math.inf]}, ValueError, "loss_weights: expected 1 finite numbers"),
    ({"loss_weights": 2.0}, TypeError, "loss_weights: expected a sequence of numbers, got 2.0"),
    ({"loss_weights": ["1"]}, TypeError, "loss_weights: expected a sequence of numbers"),
    ({"discopop_tau": 0}, ValueError, "discopop_tau: expected a finite number > 0, got 0"),
    ({"loss_type": "exo_pair", "label_smoothing": 0.0}, ValueError, r"'exo_pair' needs a number in \(0, 0.5\)"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"),
    ({"loss_type": "robust", "label_smoothing": "0.1"}, ValueError, "label_smoothing"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing: read by aot, .*; got loss_type hinge"),
    ({"ld_alpha": 1.5}, ValueError, r"ld_alpha: expected a number in \[0, 1\] or None, got 1.5"),
    ({"ld_alpha": 0.5, "ref": fl.LogProbs(torch.zeros(4))}, ValueError, "ld_alpha: needs the reference's log-probs per token"),
    ({"use_weighting": 1}, TypeError, "use_weighting: expected a bool, got 1"),
    ({"use_weighting": True, "loss_type": ("sigmoid", "aot")}, ValueError,
     "use_weighting: loss_type 'aot' sorts over the batch"),
    ({"use_weighting": True, "policy": fl.LogProbs(torch.zeros(4, 3))}, ValueError, "use_weighting: needs the policy's logits"),
    ({"loss_type": "apo_zero", "divergence": "js"}, ValueError, "divergence: loss_type 'apo_zero' has no f-DPO form, got 'js'"),
    ({"loss_type": ("sigmoid", "aot"), "divergence": "js"}, ValueError, "divergence: loss_type 'aot' has no f-DPO form"),
    ({"alpha": 0.5}, TypeError, "alpha"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    options, error, words = BAD[case]
    options = {"policy": Z, "ref": Z} | options
    with pytest.raises(error, match=words):
        fl.preference_loss(labels=Y, **options, shift=False)


def test_what_the_plans_and_names_refuse():
    with pytest.raises(ValueError, match="plan: 'row_blocks' is not possible here: this loss looks at the whole batch"):
        fl.preference_loss(
            fl.Hidden(torch.zeros(4, 3, 2), torch.zeros(5, 2)), Y, None, loss_type="aot", plan="row_blocks", shift=False
        )
    with pytest.raises(TypeError, match="ipo_loss: `loss_type` is fixed to 'ipo'"):
        fl.ipo_loss(Z, Y, Z, loss_type="sigmoid", shift=False)
