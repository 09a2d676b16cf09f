"""fl.Support and fl.logits_at: against the twin's masked logits, from every source and head, ragged and padded; bad input."""

import math

import pytest
import torch
from helpers import Judge, asking, double, labels_for, relative

import fused_losses as fl
from fused_losses.core import support as forms
from fused_losses.engine import support as engine

pytestmark = pytest.mark.usefixtures("one_thread")

V = 41


def kept(labels, vocab=V, most=9):
    """Padded ids [..., K] that contain the label of each token that counts: of some tokens many, of some only the label."""
    ids = torch.rand(*labels.shape, vocab).argsort(-1)[..., :most]
    label = labels.clamp(min=0).unsqueeze(-1)
    ids = ids.masked_fill(ids == label, -1)
    place = torch.randint(most, labels.shape).unsqueeze(-1)
    counts = torch.randint(1, most + 1, labels.shape).unsqueeze(-1)
    ids = ids.masked_fill(torch.arange(most) >= counts, -1)
    return ids.scatter(-1, place.clamp(max=most - 1), label).masked_fill((labels < 0).unsqueeze(-1), -1)


def ragged(ids):
    keep = ids >= 0
    return fl.Support(ids[keep], torch.nn.functional.pad(keep.sum(-1).flatten().cumsum(0), (1, 0)))


def sources(kind):
    """Build(leaves) -> source, and the leaves."""
    if kind == "logits":
        leaves = [torch.randn(3, 5, V, requires_grad=True)]
        return lambda x: fl.Logits(x[0], temperature=0.7, softcap=5.0), leaves
    x, weight = torch.randn(3, 5, 8), torch.randn(V, 8)
    leaves = [t.requires_grad_() for t in (x, weight, torch.randn(V), torch.randn(2, 8), torch.randn(V, 2))]
    if kind == "hidden":
        return lambda t: fl.Hidden(t[0], t[1]), leaves[:2]
    return (
        lambda t: fl.Hidden(t[0], t[1], t[2], softcap=4.0, scale=0.5, lora=fl.Lora(t[3], t[4], 0.3), temperature=0.7),
        leaves,
    )


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("form", ["padded", "ragged"])
@pytest.mark.parametrize("kind", ["logits", "hidden", "every option of a head"])
def test_matches_the_twin(backend, kind, form, shift):
    build, leaves = sources(kind)
    y = labels_for((3, 5), V, "cpu")
    y[0, 2:] = -100
    ids = kept(y[:, 1:] if shift else y)
    support = fl.Support(ids) if form == "padded" else ragged(ids)

    def call(library):
        return lambda t: library.token_stats(build(t), y, support=support, entropy=True, collision=True, shift=shift)

    judge = Judge(call(fl), call(fl.reference), leaves)
    for name in ("logps", "entropy", "lse"):
        judge.value(name, lambda stats, name=name: getattr(stats, name))
    mine, truth = judge.mine, judge.truth
    assert torch.equal(mine.correct, truth.correct) and torch.equal(mine.mask, truth.mask)
    torch.testing.assert_close(mine.collision.double(), truth.collision, rtol=1e-4, atol=1e-5)
    judge.gradients("sum", lambda stats: (stats.logps - 0.3 * stats.entropy).sum())


def test_only_kept_ids_get_a_gradient(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    build, leaves = sources("hidden")
    y = labels_for((3, 5), V, "cpu")
    ids = kept(y)
    stats = fl.token_stats(build(leaves), y, support=fl.Support(ids), shift=False)
    weight = torch.autograd.grad(stats.logps.sum(), leaves[1])[0]
    used = torch.zeros(V, dtype=torch.bool)
    used[ids[ids >= 0]] = True
    assert not weight[~used].any() and weight[used].any(-1).float().mean() > 0.9


def test_all_ids_are_the_whole_vocabulary(monkeypatch):
    """And the kept mass is the ratio of the log-probs with and without the support."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    build, leaves = sources("every option of a head")
    y = labels_for((3, 5), V, "cpu")
    whole = fl.token_stats(build(leaves), y, entropy=True, shift=False)
    every = fl.token_stats(
        build(leaves), y, entropy=True, support=fl.Support(torch.arange(V).expand(3, 5, V)), shift=False
    )
    torch.testing.assert_close(every.logps, whole.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
    ids = kept(y)
    some = fl.token_stats(build(leaves), y, support=fl.Support(ids), shift=False)
    p = fl.logits_at(build(leaves), torch.arange(V).expand(3, 5, V)).softmax(-1)
    mass = p.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0).sum(-1)
    torch.testing.assert_close((whole.logps - some.logps).exp()[y >= 0], mass[y >= 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gmpo", "vespo"])
def test_policy_gradients_over_a_support(monkeypatch, loss_type, packed):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    build, leaves = sources("hidden")
    y = labels_for((3, 5), V, "cpu")
    y[1, 3:] = -100
    ids, a, old = kept(y), torch.randn(3), -1 - torch.rand(3, 5)
    if packed:
        ids, y, old = (t.flatten(0, 1) for t in (ids, y, old))
        leaves = [leaves[0].detach().flatten(0, 1).requires_grad_(), leaves[1]]
    cu = torch.tensor([0, 5, 10, 15]) if packed else None

    def call(library):
        named = {"old_logps": old, "loss_type": loss_type, "entropy_coef": 0.1, "cu_seqlens": cu, "shift": False}
        return lambda t: library.grpo_loss(build(t), y, a.to(t[0].dtype), support=fl.Support(ids), **named)

    judge = Judge(call(fl), call(fl.reference), leaves)
    judge.value("loss", lambda out: out.loss)
    judge.gradients("loss", lambda out: out.loss)
    for name, x in judge.truth.metrics.items():
        torch.testing.assert_close(judge.mine.metrics[name].double(), x, rtol=1e-4, atol=1e-5)


def test_no_product_with_the_vocabulary(monkeypatch):
    """A head of 200,000 tokens, of which 300 rows are finite: the others are never read."""
    weight = torch.full((200_000, 4), math.nan)
    ids = torch.arange(300).view(3, 5, 20)
    weight[:300] = torch.randn(300, 4)
    x = torch.randn(3, 5, 4, requires_grad=True)
    out = fl.token_stats(fl.Hidden(x, weight), ids[..., 7], support=fl.Support(ids), entropy=True, shift=False)
    (g,) = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), x)
    assert out.logps.isfinite().all() and g.isfinite().all()


def test_logits_at_are_those_of_the_head(device):
    build, leaves = sources("every option of a head")
    ids = torch.randint(V, (3, 5, 4))
    ids[0, 0, 1:] = -1
    found = fl.logits_at(build(leaves), ids)
    exact = [double(t) for t in leaves]
    z = fl.reference.stats.transformed(build(exact)).gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
    assert relative(found, z) <= 1e-6
    g = torch.randn(3, 5, 4)
    mine, truth = (torch.autograd.grad((x * g).sum(), asking(t)) for x, t in ((found, leaves), (z, exact)))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, truth, strict=True))
    logits = torch.randn(3, 5, V, dtype=torch.bfloat16)
    assert torch.equal(fl.logits_at(logits, ids), logits.gather(-1, ids.clamp(min=0)).float().masked_fill(ids < 0, 0))


def test_tokens_without_ids():
    """A batch in which nothing counts, and one without tokens."""
    y = torch.full((2, 3), -100)
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    none = fl.Support(torch.zeros(0, dtype=torch.long), torch.zeros(7, dtype=torch.long))
    for support in (none, fl.Support(torch.full((2, 3, 2), -1))):
        out = fl.token_stats(fl.Hidden(x, weight), y, support=support, shift=False)
        (g,) = torch.autograd.grad(out.logps.sum(), x)
        assert not out.logps.any() and not g.any()
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert fl.token_stats(
        torch.zeros(0, 4, 7), empty, support=fl.Support(empty[..., None]), shift=False
    ).logps.shape == (0, 4)


def test_the_modules_are_those_of_the_surface():
    assert fl.Support is forms.Support and fl.logits_at is engine.logits_at


Z, Y = torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long)
IDS = torch.arange(3).expand(2, 3, 3)
H = fl.Hidden(torch.zeros(2, 3, 4), torch.zeros(7, 4))


def stats(ids=IDS, offsets=None, width=None, policy=Z, **options):
    return lambda: fl.token_stats(policy, Y, **{"support": fl.Support(ids, offsets, width), "shift": False, **options})


FLAT = torch.arange(3).repeat(6)
BAD = [
    (stats(IDS.float()), TypeError, "support: expected ids as an int32 or int64 tensor, got torch.float32"),
    (stats(IDS[0]), ValueError, r"support: expected ids \[2, 3, 'K'\], got \[3, 3\]"),
    (stats(IDS + 1), ValueError, r"label 0 at \[0, 0\] is not"),
    (stats(IDS * 0), ValueError, r"expected ids that differ from one another, got equal ones at \[0, 0\]"),
    (stats(torch.tensor([0, 9]).expand(2, 3, 2)), ValueError, r"ids: expected tokens in \[0, 7\), got 9"),
    (stats(FLAT, torch.arange(6) * 3), ValueError, "expected 7 offsets for 6 output tokens"),
    (stats(FLAT, torch.arange(7) * 2), ValueError, "expected offsets that rise from 0 to 18"),
    (stats(FLAT, torch.arange(7) * 3, 2), ValueError, "expected width >= 3, got 2"),
    (stats(IDS, width=3), ValueError, "width is for flat ids"),
    (stats(FLAT, torch.arange(7.0) * 3), TypeError, "expected offsets as an int32 or int64"),
    (stats(IDS, torch.arange(7)), ValueError, r"expected flat ids \[M\] and offsets"),
    (stats(support=IDS), TypeError, r"support: expected fl.Support\(ids\), got Tensor"),
    (stats(ref=Z), ValueError, "ref: with support=, expected None"),
    (stats(policy=H, plan="row_blocks"), ValueError, "plan, workspace.* got support="),
    (stats(policy=fl.LogProbs(Z[..., 0])), ValueError, "policy: fl.LogProbs has no logits"),
    (stats(divergence="js"), ValueError, "divergence: 'js' needs ref"),
    (lambda: fl.grpo_loss(Z, Y, torch.ones(2), ref=Z, support=fl.Support(IDS), shift=False), ValueError, "ref: with support="),
    (lambda: fl.logits_at(Z, IDS.float()), TypeError, "expected ids as an int32"),
    (lambda: fl.logits_at(Z, 3), TypeError, "ids: expected an integer tensor"),
    (lambda: fl.logits_at(fl.LogProbs(Z[..., 0]), IDS), ValueError, "policy: fl.LogProbs has no logits"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
