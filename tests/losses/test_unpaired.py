"""KTO, BCO and APO-zero on single responses: check values, closed-form gradients, baselines and running shifts."""

import math

import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

LN2 = 0.693147180559945


def given(*h, dtype=torch.float64):
    """Responses of two tokens whose log-ratios are h: policy (a leaf), labels, reference."""
    p = torch.tensor([[-1.0, x - 2.0] for x in h], dtype=dtype).requires_grad_()
    return (
        p,
        torch.zeros(len(h), 2, dtype=torch.long),
        fl.LogProbs(torch.tensor([[-1.5, -1.5]], dtype=dtype).expand(len(h), 2)),
    )


def flags(*x):
    return torch.tensor(x, dtype=torch.bool)


def batch(s=5, t=6, v=11, dtype=torch.float32):
    z, w = (torch.randn(s, t, v, dtype=dtype) for _ in range(2))
    y = torch.randint(0, v, (s, t))
    y[:, :2] = -100
    y[1] = -100  # nothing is left of it
    return z.requires_grad_(), y, w


# ---- KTO ---------------------------------------------------------------------------------------------------------------


def test_kto_check_values():
    """h = 0.7 desirable, h = -0.4 undesirable, beta = 0.1, z0 = 0.25."""
    p, y, q = given(0.7, -0.4)
    for library in (fl, fl.reference):
        found = library.kto_loss(fl.LogProbs(p), y, q, flags(1, 0), baseline=0.25, reduction="none", shift=False).loss
        assert found.tolist() == pytest.approx([0.4887518980531451, 0.48375571893792757], rel=1e-12)


@pytest.mark.parametrize("baseline", [0.0, 0.8])
def test_kto_gradient(baseline):
    """dloss/dh = -+ w beta sigmoid'(beta (h - z0)), over S."""
    h, good = (0.3, -2.0, 1.1), flags(1, 0, 0)
    p, y, q = given(*h)
    out = fl.kto_loss(
        fl.LogProbs(p),
        y,
        q,
        good,
        baseline=torch.tensor(baseline),
        beta=0.5,
        desirable_weight=1.5,
        undesirable_weight=0.25,
        shift=False,
    )
    (g,) = torch.autograd.grad(out.loss, p)
    for s, (x, w) in enumerate(zip(h, (-1.5, 0.25, 0.25), strict=True)):
        slope = 1 / (1 + math.exp(-0.5 * (x - baseline)))
        assert g[s].tolist() == pytest.approx([w * 0.5 * slope * (1 - slope) / 3] * 2, rel=1e-6)


def test_kto_at_the_reference():
    p, y, q = given(0.0, 0.0)
    out = fl.kto_loss(fl.LogProbs(p), y, q, flags(1, 0), reduction="none", desirable_weight=3.0, shift=False)
    assert out.loss.tolist() == [1.5, 0.5]


def test_apo_zero_is_kto_without_a_baseline():
    p, y, q = given(0.7, -0.4, 0.2)
    same = fl.kto_loss(fl.LogProbs(p), y, q, flags(1, 0, 0), baseline=0.0, reduction="none", shift=False).loss
    other = fl.kto_loss(
        fl.LogProbs(p), y, q, flags(1, 0, 0), loss_type="apo_zero_unpaired", reduction="none", shift=False
    ).loss
    torch.testing.assert_close(other, same)
    assert other.sum().item() == pytest.approx(
        sum((1 - 1 / (1 + math.exp(-0.07)), 1 / (1 + math.exp(0.04)), 1 / (1 + math.exp(-0.02))))
    )


def test_metrics_as_trl_logs_them():
    p, y, q = given(0.7, -0.4, 0.2)
    out = fl.kto_loss(fl.LogProbs(p), y, q, flags(1, 0, 1), baseline=torch.tensor(0.25), beta=0.5, shift=False)
    expected = {
        "rewards/chosen": 0.225, "rewards/rejected": -0.2, "rewards/margins": 0.425, "logps/chosen": -2.55,
        "logps/rejected": -3.4, "count/chosen": 2, "count/rejected": 1, "kl": 0.25,
    }  # fmt: skip
    assert {n: x.item() for n, x in out.metrics.items()} == pytest.approx(expected)
    assert not any(x.requires_grad or x.dim() for x in out.metrics.values())
    none = fl.kto_loss(fl.LogProbs(p), y, q, flags(1, 1, 1), shift=False).metrics
    assert none["rewards/rejected"].isnan() and none["logps/rejected"].isnan() and none["rewards/margins"].isnan()
    assert none["rewards/chosen"].item() == pytest.approx(0.1 * 0.5 / 3) and none["count/rejected"] == 0


def test_constants_get_no_gradient():
    p, y, q = given(0.7, -0.4)
    constant, w = torch.tensor(0.2, requires_grad=True), torch.ones(2, requires_grad=True)
    for out in (
        fl.kto_loss(fl.LogProbs(p), y, q, flags(1, 0), baseline=constant, shift=False),
        fl.bco_loss(fl.LogProbs(p), y, q, flags(1, 0), delta=constant, weights=w, shift=False),
    ):
        assert torch.autograd.grad(out.loss, [p, constant, w], allow_unused=True)[1:] == (None, None)
        assert not any(x.requires_grad for x in out.metrics.values())


@pytest.mark.parametrize("loss", [fl.kto_loss, fl.bco_loss])
def test_far_from_the_reference_stays_finite(loss):
    for x in (1e4, -1e4):
        p, y, q = given(x, x, dtype=torch.float32)
        out = loss(fl.LogProbs(p), y, q, flags(1, 0), beta=1.0, reduction="none", shift=False)
        (g,) = torch.autograd.grad(out.loss.sum(), p)
        assert out.loss.isfinite().all() and g.isfinite().all()
        wrong = 1 if x > 0 else 0  # of the two, the one that is not as wished
        assert out.loss[wrong] >= 1 and out.loss[1 - wrong] == 0


@pytest.mark.parametrize("loss", [fl.kto_loss, fl.bco_loss])
def test_ignored_sequences(backend, loss):
    z, y, w = batch()
    out = loss(z, y, w, flags(1, 0, 0, 1, 1), reduction="none", shift=False)
    (g,) = torch.autograd.grad(out.loss.sum(), z)
    assert out.loss[1].item() == pytest.approx(0.5 if loss is fl.kto_loss else LN2)  # h = 0
    assert not g[y == -100].any() and g[y != -100].any(-1).all()


def test_reference_of_whole_sequences(backend):
    z, y, w = batch()
    tokens = fl.token_stats(w, y, shift=False).logps
    good = flags(1, 0, 0, 1, 1)
    for loss in (fl.kto_loss, fl.bco_loss):
        sums = loss(z, y, fl.LogProbs(tokens.sum(1)), good, shift=False).loss
        torch.testing.assert_close(sums, loss(z, y, w, good, shift=False).loss)


# ---- its baseline ------------------------------------------------------------------------------------------------------


def test_baseline_is_the_mean_and_not_negative():
    p, y, q = given(0.7, -0.4, 0.9)
    z0 = fl.kto_baseline(fl.LogProbs(p), y, q, shift=False)
    assert z0.shape == () and not z0.requires_grad and z0.item() == pytest.approx(0.4)
    p, y, q = given(0.7, -1.4)
    assert (
        fl.kto_baseline(fl.LogProbs(p), y, q, shift=False)
        == 0
        == fl.reference.kto_baseline(fl.LogProbs(p), y, q, shift=False)
    )
    assert fl.kto_baseline(fl.LogProbs(p[:0]), y[:0], fl.LogProbs(p[:0].detach()), shift=False) == 0


@pytest.mark.parametrize(
    "options", [{}, {"shift": True}, {"packed": True}, {"plan": "row_blocks"}, {"plan": "vocab_chunks"}], ids=str
)
def test_baseline_from_hidden_states(options):
    options = {"shift": False, **options}
    x, a = torch.randn(4, 5, 8), torch.randn(13, 8, requires_grad=True)
    y = torch.randint(0, 13, (4, 5))
    y[2, 1:] = -100
    if options.pop("packed", False):
        x, y = x.flatten(0, 1), y.flatten()
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 12, 20])
    policy, ref = fl.Hidden(x.requires_grad_(), a * 2), fl.Hidden(x.detach(), a.detach())
    same = {n: v for n, v in options.items() if n != "plan"}
    for sides in ((policy, ref), (ref, policy)):  # one of them is below 0
        z0, exact = (
            fl.kto_baseline(sides[0], y, sides[1], **options),
            fl.reference.kto_baseline(sides[0], y, sides[1], **same),
        )
        torch.testing.assert_close(z0, exact)
        assert not z0.requires_grad
    assert fl.kto_baseline(policy, y, ref, **options) + fl.kto_baseline(ref, y, policy, **options) > 0.1


def test_baseline_and_delta_over_ranks(monkeypatch):
    """The other rank has three sequences with log-ratios of sum -2.4: averaged before the maximum, each sequence alike."""
    group, asked = object(), []

    def all_reduce(x, group):
        asked.append(group)
        x += torch.tensor([-2.4, 3.0], dtype=x.dtype)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    p, y, q = given(4.0, 0.4)
    assert fl.kto_baseline(fl.LogProbs(p), y, q, process_group=group, shift=False).item() == pytest.approx(2.0 / 5)
    p, y, q = given(0.4)
    assert fl.kto_baseline(fl.LogProbs(p), y, q, process_group=group, shift=False) == 0
    delta = fl.RunningDelta(process_group=group)
    assert delta.update(torch.tensor([4.0, 0.4])).item() == pytest.approx(2.0 / 5)
    assert delta.count == 5 and asked == [group] * 3


# ---- BCO ---------------------------------------------------------------------------------------------------------------


def test_bco_values_and_gradient():
    """bco_pair's check value is one loss of each kind, without a shift."""
    p, y, q = given(0.7, -0.4)
    for library in (fl, fl.reference):
        out = library.bco_loss(fl.LogProbs(p), y, q, flags(1, 0), reduction="sum", shift=False)
        assert out.loss.item() == pytest.approx(1.3321067227767311, rel=1e-12)
    out = fl.bco_loss(
        fl.LogProbs(p), y, q, flags(1, 0), delta=torch.tensor(0.3), weights=torch.tensor([1.0, 5.0]), shift=False
    )
    (g,) = torch.autograd.grad(out.loss, p)
    minus = 1 / (1 + math.exp(0.07 - 0.3)), 1 / (1 + math.exp(-(-0.04 - 0.3)))
    assert g[:, 0].tolist() == pytest.approx([-0.1 * minus[0] / 2, 5 * 0.1 * minus[1] / 2], rel=1e-6)
    assert out.metrics["delta"].item() == pytest.approx(0.3) and "kl" not in out.metrics
    p, y, q = given(0.0, 0.0)
    assert fl.bco_loss(fl.LogProbs(p), y, q, flags(1, 0), shift=False).loss.item() == pytest.approx(LN2)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_running_delta_is_updated_before_use(momentum):
    """After rewards (0.07, -0.04) and then (0.09, 0.05, 0.01): the mean of all five, or 0.9 of the first mean."""
    means = [0.015, 0.18 / 5 if momentum is None else 0.9 * 0.015 + 0.1 * 0.05]
    for library in (fl, fl.reference):
        delta = fl.RunningDelta(momentum)
        for h, good, mean in zip([(0.7, -0.4), (0.9, 0.5, 0.1)], [flags(1, 0), flags(0, 1, 0)], means, strict=True):
            p, y, q = given(*h)
            out = library.bco_loss(fl.LogProbs(p), y, q, good, delta=delta, shift=False)
            fixed = fl.bco_loss(fl.LogProbs(p), y, q, good, delta=mean, shift=False)
            assert delta.mean.item() == pytest.approx(mean) == out.metrics["delta"].item()
            torch.testing.assert_close(out.loss, fixed.loss)
            torch.testing.assert_close(torch.autograd.grad(out.loss, p), torch.autograd.grad(fixed.loss, p))
        assert delta.count == 5


def test_running_delta_keeps_its_history():
    delta = fl.RunningDelta()
    first = delta.update(torch.tensor([1.0, 3.0]))
    kept = delta.state_dict()
    where = delta.mean.data_ptr()
    assert delta.update(torch.tensor([8.0])) == 4 and delta.mean.data_ptr() == where  # as a CUDA graph needs it
    assert first == 2 == kept["mean"] and kept["count"] == 2  # not moved along
    again = fl.RunningDelta()
    again.load_state_dict(kept)
    assert again.update(torch.tensor([8.0])) == 4
    assert again.update(torch.tensor([])) == 4 and again.count == 3
    for m in (None, 0.5):
        empty = fl.RunningDelta(m)
        assert empty.update(torch.tensor([])) == 0
        assert empty.update(torch.tensor([6.0])) == 6
        assert empty.update(torch.tensor([])) == 6


def test_running_delta_from_hidden_states():
    """The gradient does not run through the shift, and blocks of rows do not do."""
    x, a = torch.randn(4, 5, 8, requires_grad=True), torch.randn(13, 8)
    y, good = torch.randint(0, 13, (4, 5)), flags(1, 0, 0, 1)
    policy, ref = fl.Hidden(x, a), fl.Hidden(x.detach(), a + 0.3)
    out = fl.bco_loss(policy, y, ref, good, delta=fl.RunningDelta(), shift=False)
    fixed = fl.bco_loss(policy, y, ref, good, delta=out.metrics["delta"], plan="row_blocks", shift=False)
    torch.testing.assert_close(out.loss, fixed.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x), torch.autograd.grad(fixed.loss, x))
    with pytest.raises(ValueError, match="plan: 'row_blocks' is not possible here: this loss looks at the whole batch"):
        fl.bco_loss(policy, y, ref, good, delta=fl.RunningDelta(), plan="row_blocks", shift=False)


Z, Y, GOOD = torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.long), torch.tensor([True, False, True])
BAD = [
    (lambda: fl.kto_loss(Z, Y, Z, GOOD[:2], shift=False), ValueError,
     r"desirable: expected \[3\] on cpu, one for each sequence, got \[2\]"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD.float(), shift=False), TypeError,
     "desirable: expected a bool tensor, got torch.float32"),
    (lambda: fl.kto_loss(Z, Y, Z, [True], shift=False), TypeError, "desirable: expected a bool tensor, got list"),
    (lambda: fl.kto_loss(Z[0], Y[0], Z[0], GOOD, shift=False), ValueError, r"labels: expected \[S, T\]"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, loss_type="bco", shift=False), ValueError,
     "loss_type: unknown name 'bco'; known: kto, apo_zero_unpaired"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, beta=0, shift=False), ValueError, "beta: expected a finite number > 0"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, desirable_weight=-1, shift=False), ValueError,
     "desirable_weight: expected a finite number > 0"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, baseline=GOOD.float(), shift=False), ValueError,
     r"baseline: .* 0-d float tensor, got .* \[3\]"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, baseline=math.inf, shift=False), ValueError, "baseline: expected a finite number"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, loss_type="apo_zero_unpaired", baseline=0.1, shift=False), ValueError,
     "baseline: is for loss_type='kto'"),
    (lambda: fl.kto_loss(Z, Y, Z, GOOD, betta=1, shift=False), TypeError, "betta"),
    (lambda: fl.kto_loss(Z.flatten(0, 1), Y.flatten(), Z.flatten(0, 1), GOOD, shift=False,
                         cu_seqlens=torch.tensor([0, 4, 9, 13])),
     ValueError, "cu_seqlens: expected offsets rising from 0 to 12"),
    (lambda: fl.kto_baseline(Z, Y, Z, reduction="sum", shift=False), TypeError, "fl.kto_baseline: unknown option 'reduction'"),
    (lambda: fl.bco_loss(Z, Y, Z, GOOD, weights=torch.ones(2), shift=False), ValueError, r"weights: expected \[3\]"),
    (lambda: fl.bco_loss(Z, Y, Z, GOOD, weights=GOOD, shift=False), TypeError, "weights: expected a float32 or"),
    (lambda: fl.bco_loss(Z, Y, Z, GOOD, delta="mean", shift=False), ValueError, "delta: expected a finite number"),
    (lambda: fl.RunningDelta(1.0), ValueError, r"momentum: expected a number in \[0, 1\) or None, got 1.0"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
