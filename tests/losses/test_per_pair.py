"""Options of preference_loss with a number for each pair: beta, margins, weights and soft labels."""

import pytest
import torch
from family_batches import Batch

import fused_losses as fl
from fused_losses.core.options import OFFSET, PER_PAIR, SOFT, SORTED
from fused_losses.losses.preference import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = {
    "beta": torch.tensor([0.1, 0.4, 0.9]),
    "margins": torch.tensor([0.3, -0.2, 1.1]),
    "weights": torch.tensor([0.5, 0.0, 2.0]),
    "label_smoothing": torch.tensor([0.0, 0.35, 1.0]),
}


def readable(name):
    """The options that a loss type takes as tensors."""
    if name in SORTED:
        return ()
    without = {"margins": name in OFFSET, "label_smoothing": name in SOFT, "weights": name != "sft", "beta": True}
    return tuple(n for n in PER_PAIR if without[n])


def batch_with(name, options, packed=False):
    made = Batch("preference_loss", "exo_pair, smoothed" if name == "exo_pair" else name, packed)
    return made, made.options | {n: NUMBERS[n] for n in options}


CASES = [(name, n) for name in LOSSES for n in readable(name)] + [(name, "all") for name in LOSSES if readable(name)]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_matches_the_twin(own_backend, name, option):
    made, made.options = batch_with(name, readable(name) if option == "all" else (option,))
    made.compare("hidden", "hidden", reduction="mean")
    made.compare("logits", "log-probs", num_items=torch.tensor(7.0))


@pytest.mark.parametrize("plan", ["auto", "row_blocks", "vocab_chunks"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{"divergence": "js"}, {"ld_alpha": 0.4}, {"use_weighting": True}], ids=str)
def test_in_every_plan(own_backend, options, packed, plan):
    made, named = batch_with("sigmoid", PER_PAIR, packed)
    made.options = named | options
    made.compare("hidden", "hidden", plan=plan)


@pytest.mark.parametrize("name", [n for n in LOSSES if readable(n)])
def test_equal_numbers_are_one_number(backend, name):
    """The kernel of one number, and what computes several."""
    made, _ = batch_with(name, ())
    policy, ref = fl.Hidden(made.x, made.weight), fl.Hidden(made.ref_x, made.ref_weight)

    def loss(**numbers):
        return fl.preference_loss(policy, made.y, ref, shift=False, **made.options | numbers)

    one = loss(beta=0.3)
    for beta in (torch.full((3,), 0.3), torch.tensor(0.3, dtype=torch.float64)):
        several = loss(beta=beta, **({} if name == "sft" else {"weights": torch.full((3,), 2.5)}))
        torch.testing.assert_close(several.loss, one.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(several.metrics, one.metrics, rtol=1e-5, atol=1e-6)
    if name in OFFSET:
        torch.testing.assert_close(loss(beta=0.3, margins=torch.zeros(3)).loss, one.loss, rtol=1e-5, atol=1e-6)
    if name in SOFT:
        smooth, soft = (loss(label_smoothing=eps).loss for eps in (0.2, torch.full((3,), 0.2)))
        torch.testing.assert_close(soft, smooth, rtol=1e-5, atol=1e-6)


def test_by_hand():
    """ODPO: -log sigmoid(beta h - margin); soft labels; the mean is that of pairs counted by their weights."""
    p, q = torch.tensor([[-1.0], [-2.0], [-3.0], [-1.5]]), torch.tensor([[-1.5], [-1.0], [-2.0], [-2.5]])
    y = torch.zeros(4, 1, dtype=torch.long)
    h = (p - q).squeeze(1)
    m = torch.tensor([0.2, 0.7]) * (h[:2] - h[2:]) - torch.tensor([0.1, -0.4])
    eps, w = torch.tensor([0.25, 0.9]), torch.tensor([1.0, 3.0])
    each = -(1 - eps) * torch.nn.functional.logsigmoid(m) - eps * torch.nn.functional.logsigmoid(-m)
    named = {
        "beta": torch.tensor([0.2, 0.7]),
        "margins": torch.tensor([0.1, -0.4]),
        "label_smoothing": eps,
        "weights": w,
    }
    out = {
        r: fl.dpo_loss(fl.LogProbs(p), y, fl.LogProbs(q), shift=False, reduction=r, **named)
        for r in ("none", "mean", "sum")
    }
    torch.testing.assert_close(out["none"].loss, w * each)
    torch.testing.assert_close(out["mean"].loss, (w * each).sum() / 4)
    torch.testing.assert_close(out["sum"].loss, (w * each).sum())
    assert out["mean"].metrics["rewards/margins"] == pytest.approx((named["beta"] * (h[:2] - h[2:])).mean().item())


def test_no_gradient_reaches_them():
    made, options = batch_with("sigmoid", PER_PAIR)
    leaves = {n: x.clone().requires_grad_() for n, x in options.items() if n in PER_PAIR}
    x = made.x.clone().requires_grad_()
    ref = fl.Hidden(made.ref_x, made.ref_weight)
    fl.dpo_loss(fl.Hidden(x, made.weight), made.y, ref, shift=False, **leaves).loss.backward()
    assert x.grad.any() and all(t.grad is None for t in leaves.values())


def test_micro_batches_add_up():
    """Weighted sums of micro-batches, divided by the sum of all weights, are the mean of the whole batch."""
    made, options = batch_with("sigmoid", PER_PAIR)
    named = {n: x for n, x in options.items() if n in PER_PAIR}
    z, w = made.x @ made.weight.T, made.ref_x @ made.ref_weight.T
    whole = fl.dpo_loss(z, made.y, w, shift=False, **named).loss
    total = NUMBERS["weights"].sum()

    def part(i):
        own, pair = {n: x[[i]] for n, x in named.items()}, [i, i + 3]
        return fl.dpo_loss(z[pair], made.y[pair], w[pair], shift=False, num_items=total, **own).loss

    torch.testing.assert_close(sum(part(i) for i in range(3)), whole)


def test_under_torch_compile(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    made, options = batch_with("sigmoid", PER_PAIR)
    named = {n: x for n, x in options.items() if n in PER_PAIR}
    w = made.ref_x @ made.ref_weight.T

    def loss(z, named):
        return fl.dpo_loss(z, made.y, w, shift=False, **named).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = []
    for function in (loss, compiled):
        z = (made.x @ made.weight.T).requires_grad_()
        value = function(z, named)
        found.append((value, torch.autograd.grad(value, z)))
    torch.testing.assert_close(*found)


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.long)
BAD = [
    ({"beta": torch.ones(3)}, ValueError, r"beta: expected a number or a float tensor \[2\] on cpu, one for each pair, got"),
    ({"beta": torch.tensor([0.1, 0.0])}, ValueError, "beta: expected numbers > 0"),
    ({"beta": torch.ones(2).long()}, ValueError, "beta: expected a number or a float tensor"),
    ({"margins": 0.3}, TypeError, r"margins: expected a float tensor \[2\], one for each pair, got float"),
    ({"margins": torch.ones(4)}, ValueError, r"margins: expected \[2\] on cpu"),
    ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "weights: expected numbers >= 0"),
    ({"label_smoothing": torch.tensor([0.1, 1.2])}, ValueError, r"label_smoothing: expected numbers in \[0, 1\]"),
    ({"margins": torch.ones(2), "loss_type": "ipo"}, ValueError, "margins: read by cdpo, discopop.*; got loss_type ipo"),
    ({"beta": torch.ones(2), "loss_type": "aot"}, ValueError, "beta: loss_type 'aot' sorts over the batch"),
    ({"weights": torch.ones(2), "loss_type": ("sigmoid", "sft")}, ValueError, "weights: loss_type 'sft' is a mean over tokens"),
    ({"label_smoothing": torch.ones(2), "loss_type": "robust"}, ValueError, "label_smoothing: loss_type 'robust' takes one"),
    ({"label_smoothing": torch.ones(2), "loss_type": "hinge"}, ValueError, "a tensor is read by cdpo, sigmoid"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    options, error, words = BAD[case]
    for library in (fl, fl.reference):
        with pytest.raises(error, match=words):
            library.preference_loss(Z, Y, None, shift=False, **options)
