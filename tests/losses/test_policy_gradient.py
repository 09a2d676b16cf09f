"""The GRPO family: TRL's formulas by hand, check values of the KL estimators, clipping, normalisers, exact KL in every plan."""

import math

import pytest
import torch
from family_batches import Batch
from helpers import least_workspace, relative

import fused_losses as fl
from fused_losses.core.policy_options import BY_TOKENS, POLICY_LOSSES
from fused_losses.losses import policy_terms

pytestmark = pytest.mark.usefixtures("one_thread")

NEEDED = {"max_completion_length": 11, "epsilon": 0.1, "epsilon_high": 1.5, "intellect_tau": 0.5}  # without a default
EVERY = [{"loss_type": name, **{n: NEEDED[n] for n in rule.needs}} for name, rule in POLICY_LOSSES.items()]
CLIPPING = [o for o in EVERY if o["loss_type"] in ("grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo")]


def readable(loss_type, **options):
    """Of some options those that a loss type reads."""
    rule = POLICY_LOSSES[loss_type]
    return {n: x for n, x in options.items() if n in (*rule.reads, *rule.needs)}


def batch(s=4, t=6, dtype=torch.float64):
    """Log-probs of policy (a leaf), sampler and reference, labels with ignored tokens, a sequence that has none, advantages."""
    logps = -2 - torch.rand(s, t, dtype=dtype)
    old, ref = logps + 0.5 * torch.randn(s, t, dtype=dtype), logps + 0.5 * torch.randn(s, t, dtype=dtype)
    y = torch.zeros(s, t, dtype=torch.long)
    y[0, 4:], y[1, :2], y[3] = -100, -100, -100
    return logps.requires_grad_(), old, ref, y, torch.tensor([1.0, -0.8, 0.3, 2.0], dtype=dtype)[:s]


def by_hand(logps, old, ref, mask, a, loss, sequence, epsilon, high, delta=None, beta=0.0, length=None, items=None):
    """TRL 1.16's _compute_loss on [B, T], written again."""
    a = a[:, None] if a.dim() == 1 else a
    x = logps - old
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    ratio = ((x * mask).sum(1, keepdim=True) / lengths if sequence else x).exp()
    if loss == "cispo":
        token = -ratio.clamp(max=high).detach() * a * logps
    else:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        token = -torch.min(capped * a, ratio.clamp(1 - epsilon, 1 + high) * a)
    d = ref - logps
    token = (token + beta * (d.exp() - d - 1)) * mask
    if loss == "grpo":
        return (token.sum(1) / lengths[:, 0]).mean()
    if loss in ("dr_grpo", "luspo"):
        return token.sum() / (len(mask) * (length or 1))
    return token.sum() / (mask.sum() if items is None else items)


@pytest.mark.parametrize("per_token", [False, True], ids=["A of sequences", "A of tokens"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("options", CLIPPING, ids=lambda o: o["loss_type"])
def test_formulas_of_trl(options, importance, per_token):
    logps, old, ref, y, a = batch()
    a = a[:, None] * torch.randn(4, 6, dtype=torch.float64) if per_token else a
    options = dict(options)
    loss, high = options["loss_type"], options.pop("epsilon_high", 0.3)
    more = {} if loss == "cispo" else {"delta": 1.5}
    items = {"num_items": 31} if loss in ("dapo", "cispo") else {}
    args = (fl.LogProbs(logps), y, a)
    named = {"old_logps": old, "ref": fl.LogProbs(ref), "importance": importance, "epsilon_high": high, "beta": 0.2}
    out = fl.grpo_loss(*args, **named, **more, **options, **items, shift=False)
    truth = by_hand(
        logps,
        old,
        ref,
        y != -100,
        a,
        loss,
        importance == "sequence",
        0.2,
        high,
        beta=0.2,
        delta=more.get("delta"),
        length=options.get("max_completion_length"),
        items=items.get("num_items"),
    )
    torch.testing.assert_close(out.loss, truth)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps), torch.autograd.grad(truth, logps))


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["loss_type"])
def test_on_policy_gradient_is_reinforce(options):
    """Without old log-probs the ratio is 1: dloss/dlog p_t = -A / normaliser, whatever the bounds."""
    logps, _, _, y, a = batch()
    mask, loss = y != -100, options["loss_type"]
    by_sequence = {
        "sequence": 4 * mask.sum(1, keepdim=True).clamp(min=1),
        "length": torch.tensor(44),
        "one": torch.tensor(4),
    }
    share = by_sequence.get(POLICY_LOSSES[loss].divisor, mask.sum())
    for importance in ("token", "sequence") if "importance" in POLICY_LOSSES[loss].reads else ("token",):
        named = {**readable(loss, epsilon=0.0), **options, "importance": importance}
        out = fl.grpo_loss(fl.LogProbs(logps), y, a, **named, shift=False)
        (g,) = torch.autograd.grad(out.loss, logps)
        torch.testing.assert_close(g, -a[:, None] * mask / share)
        same = fl.grpo_loss(fl.LogProbs(logps), y, a, old_logps=logps.detach(), **named, shift=False)
        torch.testing.assert_close(out.loss, same.loss)
        assert not any(x for n, x in out.metrics.items() if "clip" in n)
        weighted = loss in ("cispo", "vespo", "dppo_tv", "dppo_kl")  # the gradient is that of log p alone
        values = {"sapo": torch.where(a > 0, 2 / 1.0, 2 / 1.05)[:, None]}.get(loss, logps.detach() if weighted else 1)
        value = (-a[:, None] * mask / share * values).sum()
        torch.testing.assert_close(out.loss.detach(), value)


# Log-ratio, advantage -> the ratio that counts, and whether the gradient gets through. epsilon 0.2 and 0.3, delta 4
CLIPPED = [
    (0.1, 1.0, math.exp(0.1), True),
    (0.5, 1.0, 1.3, False),
    (-0.5, 1.0, math.exp(-0.5), True),
    (0.1, -1.0, math.exp(0.1), True),
    (-0.5, -1.0, 0.8, False),
    (0.5, -1.0, math.exp(0.5), True),
    (2.0, -1.0, 4.0, False),
    (300.0, 1.0, 1.3, False),
    (300.0, -1.0, 4.0, False),
    (-300.0, 1.0, 0.0, False),
    (-300.0, -1.0, 0.8, False),
]


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize(("x", "a", "ratio", "through"), CLIPPED)
def test_clipping_on_both_sides(x, a, ratio, through, importance):
    logps = torch.full((1, 2), -1.0).requires_grad_()
    named = {"old_logps": logps.detach() - x, "importance": importance, "epsilon_high": 0.3, "delta": 4.0}
    out = fl.grpo_loss(fl.LogProbs(logps), torch.zeros(1, 2, dtype=torch.long), torch.tensor([a]), **named, shift=False)
    (g,) = torch.autograd.grad(out.loss, logps)
    assert out.loss.item() == pytest.approx(-a * ratio)
    assert g.tolist() == [pytest.approx([-a * ratio / 2 * through] * 2)]
    low, high = x < math.log(0.8) and a < 0, x > math.log(1.3) and a > 0
    found = [out.metrics[f"clip_ratio/{n}_mean"].item() for n in ("low", "high", "region")]
    assert found == [low, high, low or high]


def test_wide_bounds_do_not_clip():
    logps, old, _, y, a = batch()
    out = fl.grpo_loss(
        fl.LogProbs(logps), y, a, old_logps=old, epsilon=1.0, epsilon_high=1e6, loss_type="dapo", shift=False
    )
    mask = y != -100
    torch.testing.assert_close(out.loss, -((logps - old).exp() * a[:, None] * mask).sum() / mask.sum())


def test_extreme_ratios_have_finite_gradients():
    logps = torch.tensor([[-1.0, -500.0, -1.0]]).requires_grad_()
    old = torch.tensor([[-700.0, -1.0, -math.inf]])
    y = torch.zeros(1, 3, dtype=torch.long)
    for a in (1.0, -1.0, 0.0):
        for kl in ("k1", "k2", "k3"):
            for options in [
                *EVERY,
                {"delta": 1e300},
                {"loss_type": "dppo_tv", "epsilon": 1.0},
                {"epsilon": 1e300},
                {"loss_type": "cispo", "epsilon_high": 1e300},
            ]:
                out = fl.grpo_loss(
                    fl.LogProbs(logps),
                    y,
                    torch.tensor([a]),
                    old_logps=old,
                    ref=fl.LogProbs(old.clamp(min=-900)),
                    kl=kl,
                    beta=0.1,
                    **options,
                    shift=False,
                )
                (g,) = torch.autograd.grad(out.loss, logps)
                assert out.loss.isfinite() and g.isfinite().all(), (a, kl, options)


def test_metrics_as_trl_logs_them():
    """Four tokens, three of them with A < 0; of sequences: two of them."""
    x = torch.tensor([[0.5, -0.1, 0.0], [-0.5, -0.1, 0.4]])
    logps = torch.full((2, 3), -1.0)
    y = torch.tensor([[0, -100, -100], [0, 0, 0]])
    named = {"old_logps": logps - x, "ref": fl.LogProbs(logps + 0.3)}
    out = fl.grpo_loss(fl.LogProbs(logps), y, torch.tensor([1.0, -1.0]), **named, shift=False)
    k3 = 0.04985880757600314
    assert {n: m.item() for n, m in out.metrics.items()} == pytest.approx(
        {"kl": k3, "clip_ratio/low_mean": 0.25, "clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.5}, rel=1e-5
    )
    both = fl.grpo_loss(
        fl.LogProbs(logps), y, torch.tensor([1.0, -1.0]), **named, importance="sequence", shift=False
    ).metrics
    assert [both[f"clip_ratio/{n}_mean"].item() for n in ("low", "high", "region")] == [
        0,
        0.5,
        0.5,
    ]  # mean x: 0.5, -0.067
    one = fl.grpo_loss(
        fl.LogProbs(logps), y, torch.tensor([1.0, -1.0]), **named, loss_type="cispo", epsilon_high=0.92, shift=False
    ).metrics
    assert one.keys() == {"kl", "cispo_clip_ratio"} and one["cispo_clip_ratio"] == 0.25
    z = torch.randn(2, 3, 7)
    entropy = torch.distributions.Categorical(logits=z).entropy()[y != -100].mean()
    out = fl.grpo_loss(z, y, torch.tensor([1.0, -1.0]), entropy=True, shift=False)
    assert out.metrics["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5) and "kl" not in out.metrics


# ---- KL ----------------------------------------------------------------------------------------------------------------

ESTIMATES = [
    ("k1", 0.3, -0.3, 1.0),
    ("k1", -0.3, 0.3, 1.0),
    ("k2", 0.3, 0.045, -0.3),
    ("k2", -0.3, 0.045, 0.3),
    ("k3", 0.3, 0.04985880757600314, 1 - math.exp(0.3)),
    ("k3", -0.3, 0.04081822068171781, 1 - math.exp(-0.3)),
]


@pytest.mark.parametrize(("kl", "d", "value", "slope"), ESTIMATES)
def test_kl_estimators(kl, d, value, slope):
    """d = log ref - log pi; the gradient is to log pi."""
    p = torch.full((1, 1), -2.0, dtype=torch.float64).requires_grad_()
    y, nothing = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    for library in (fl, fl.reference):
        out = library.grpo_loss(
            fl.LogProbs(p), y, nothing, ref=fl.LogProbs(p.detach() + d), beta=1.0, kl=kl, shift=False
        )
        assert out.loss.item() == pytest.approx(value, rel=1e-12) == out.metrics["kl"].item()
        assert torch.autograd.grad(out.loss, p)[0].item() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("kl", ["reverse_kl", "forward_kl", "js(beta=0.3)"])
def test_exact_kl_is_the_sum_over_the_vocabulary(backend, kl):
    z, w = (torch.randn(3, 5, 17) for _ in range(2))
    y = torch.randint(0, 17, (3, 5))
    y[0, 2:] = -100
    d = fl.reference.token_stats(z, y, w, divergence=kl, shift=False).divergence[kl]
    named = {"beta": 1.0, "kl": kl, "loss_type": "dapo"}
    out = fl.grpo_loss(z.requires_grad_(), y, torch.zeros(3), ref=w, **named, shift=False)
    torch.testing.assert_close(out.loss.detach(), d.sum() / 12)
    torch.testing.assert_close(out.metrics["kl"], out.loss.detach())
    (g,) = torch.autograd.grad(out.loss, z)
    (exact,) = torch.autograd.grad(fl.reference.grpo_loss(z, y, torch.zeros(3), ref=w, **named, shift=False).loss, z)
    torch.testing.assert_close(g, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", ["auto", "row_blocks", "vocab_chunks", "row_blocks of a sequence"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [*EVERY, {"importance": "sequence"}], ids=lambda o: "-".join(map(str, o.values())))
def test_exact_kl_in_every_plan(monkeypatch, options, packed, plan):
    """From hidden states with both heads in one pass; on-policy and off, block by block and at once."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    made = Batch("grpo_loss", "grpo", packed)
    cu = {n: x for n, x in made.options.items() if n == "cu_seqlens"}
    made.options = {"beta": 0.3, "kl": "reverse_kl", **options, **cu}
    how = {"plan": plan.split()[0]}
    if plan == "row_blocks of a sequence":
        call = lambda size: made.call(fl, torch.float32, "hidden", "hidden", how | {"workspace": size})  # noqa: E731
        how["workspace"] = least_workspace(call)
    made.compare("hidden", "hidden", **how)
    del made.extra["old_logps"]
    made.compare("hidden", "hidden", **how)


# ---- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["loss_type"])
def test_accumulated_gradients_are_those_of_the_whole_batch(options):
    logps, old, ref, y, a = batch()
    named = {**options, "beta": 0.1}
    whole = fl.grpo_loss(fl.LogProbs(logps), y, a, old_logps=old, ref=fl.LogProbs(ref), **named, shift=False)
    none = fl.grpo_loss(
        fl.LogProbs(logps), y, a, old_logps=old, ref=fl.LogProbs(ref), reduction="none", **named, shift=False
    )
    total = fl.grpo_loss(
        fl.LogProbs(logps), y, a, old_logps=old, ref=fl.LogProbs(ref), reduction="sum", **named, shift=False
    )
    by_tokens = options["loss_type"] in BY_TOKENS
    items = (y != -100).sum() if by_tokens else 4
    assert none.loss.shape == (4,) and none.loss[3] == 0
    torch.testing.assert_close(none.loss.sum() / items, whole.loss)
    torch.testing.assert_close(total.loss, none.loss.sum())
    parts = 0
    for s in (slice(0, 1), slice(1, 4)):
        parts = (
            parts
            + fl.grpo_loss(
                fl.LogProbs(logps[s]),
                y[s],
                a[s],
                old_logps=old[s],
                ref=fl.LogProbs(ref[s]),
                num_items=items,
                **named,
                shift=False,
            ).loss
        )
    torch.testing.assert_close(torch.autograd.grad(parts, logps), torch.autograd.grad(whole.loss, logps))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("plan", [{}, {"plan": "row_blocks"}], ids=str)
def test_packed_equals_padded(shift, per_token, plan):
    """Sequences of 5, 0, 4, 1 tokens. Numbers per token lie with the outputs: one fewer a row when padded and shifted."""
    lengths, t, out_t = [5, 0, 4, 1], 5, 4 if shift else 5
    x, weight = torch.randn(4, t, 6).requires_grad_(), torch.randn(9, 6) * 0.3
    y = torch.randint(0, 9, (4, t))
    for i, n in enumerate(lengths):
        y[i, n:] = -100
    a = torch.randn(4, out_t) if per_token else torch.randn(4)
    old, ref = torch.randn(4, out_t) * 0.3 - 2, torch.randn(4, out_t) * 0.3 - 2
    keep = torch.cat([i * t + torch.arange(n) for i, n in enumerate(lengths)])

    def flat(v):  # at a sequence's end nothing is predicted
        return torch.nn.functional.pad(v, (0, t - out_t), value=math.nan).flatten()[keep]

    def call(library, hidden, labels, advantages, old_logps, logps, **more):
        source = fl.Hidden(hidden, weight.to(hidden.dtype))
        out = library.grpo_loss(
            source, labels, advantages, old_logps=old_logps, ref=fl.LogProbs(logps), shift=shift, beta=0.2, **more
        )
        return out, torch.autograd.grad(out.loss, x)[0]

    padded, g = call(fl, x, y, a, old, ref, **plan)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    own = (y.flatten()[keep], flat(a) if per_token else a, flat(old), flat(ref))
    packed, h = call(fl, x.flatten(0, 1)[keep], *own, cu_seqlens=cu, **plan)
    twin, exact = call(fl.reference, x.double().flatten(0, 1)[keep], *own, cu_seqlens=cu)
    torch.testing.assert_close(packed.loss, padded.loss)
    assert (packed.loss - twin.loss).abs() <= 1e-5 * max(twin.loss.abs(), a.abs().mean())  # terms of both signs
    assert relative(g, exact) <= 1e-5 and relative(h, exact) <= 1e-5


@pytest.mark.parametrize("options", [*EVERY, {"importance": "sequence"}], ids=str)
def test_what_lies_under_the_mask_does_not_matter(options):
    logps, old, ref, y, a = batch()
    a = a[:, None].expand(4, 6)
    clean = fl.grpo_loss(
        fl.LogProbs(logps), y, a, old_logps=old, ref=fl.LogProbs(ref), beta=0.1, **options, shift=False
    )
    rubbish = [v.masked_fill(y == -100, math.nan) for v in (a, old, ref)]
    out = fl.grpo_loss(
        fl.LogProbs(logps),
        y,
        rubbish[0],
        old_logps=rubbish[1],
        ref=fl.LogProbs(rubbish[2]),
        beta=0.1,
        **options,
        shift=False,
    )
    torch.testing.assert_close(out.loss, clean.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps), torch.autograd.grad(clean.loss, logps))
    assert out.metrics == clean.metrics


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_gradients_of_ignored_tokens_are_zero(importance):
    """Before they reach a kernel, and in a sequence that has no other tokens."""
    _, old, _, y, a = batch(dtype=torch.float32)
    for number in (math.nan, -math.inf, math.inf):
        out = fl.grpo_loss(
            torch.randn(4, 6, 7, requires_grad=True),
            y,
            a[:, None].expand(4, 6).masked_fill(y == -100, number),
            old_logps=old.masked_fill(y == -100, number),
            importance=importance,
            epsilon=1.0,
            epsilon_high=1e6,  # nothing is clipped
            shift=False,
        )
        (g,) = torch.autograd.grad(out.loss, out.stats.logps)
        assert g.isfinite().all() and not g[y == -100].any() and g.any()


def test_a_kl_that_nobody_asks_for():
    """beta = 0: with a reference it is reported, without one not computed."""
    z, y, a = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3)), torch.ones(2)
    w = z + torch.randn(2, 3, 7)
    for kl in ("k2", "forward_kl"):
        free, reported = (fl.grpo_loss(z, y, a, ref=r, kl=kl, shift=False) for r in (None, w))
        assert "kl" not in free.metrics and reported.metrics["kl"] > 0
        torch.testing.assert_close(free.loss, reported.loss)


def test_a_weight_of_the_policy_term_is_a_factor_of_the_advantage():
    logps, old, ref, y, a = batch()
    w = torch.rand(4, 6, dtype=torch.float64)
    out = fl.grpo_loss(
        fl.LogProbs(logps),
        y,
        a[:, None] * w,
        old_logps=old,
        ref=fl.LogProbs(ref),
        beta=0.2,
        loss_type="dapo",
        shift=False,
    )
    ratio = (logps - old).exp()
    policy = -torch.min(ratio * a[:, None], ratio.clamp(0.8, 1.2) * a[:, None])
    d = ref - logps
    mask = y != -100
    torch.testing.assert_close(out.loss, ((w * policy + 0.2 * (d.exp() - d - 1)) * mask).sum() / mask.sum())


def test_empty_batches():
    for s, t in ((0, 3), (2, 0)):
        z = torch.zeros(s, t, 5, requires_grad=True)
        y = torch.zeros(s, t, dtype=torch.long)
        for options in EVERY:
            out = fl.grpo_loss(z, y, torch.ones(s), old_logps=torch.zeros(s, t), **options, shift=False)
            (g,) = torch.autograd.grad(out.loss, z)
            assert out.loss == 0 and g.shape == z.shape and not any(x.isnan() for x in out.metrics.values())


def test_every_loss_type_has_a_term():
    assert policy_terms.TERMS.keys() == POLICY_LOSSES.keys()


# ---- weights, masks and the entropy bonus --------------------------------------------------------------------------------


def test_weights_multiply_the_policy_term_alone():
    logps, old, ref, y, a = batch()
    w = torch.rand(4, 6, dtype=torch.float64)
    named = {"old_logps": old, "ref": fl.LogProbs(ref), "beta": 0.2, "loss_type": "dapo", "shift": False}
    as_weights = fl.grpo_loss(fl.LogProbs(logps), y, a, weights=w, **named)
    as_advantages = fl.grpo_loss(fl.LogProbs(logps), y, a[:, None] * w, **named)
    torch.testing.assert_close(as_weights.loss, as_advantages.loss)
    each = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    for weights in (each, each[:, None].expand(4, 6)):
        out = fl.grpo_loss(fl.LogProbs(logps), y, a, weights=weights, **named)
        torch.testing.assert_close(out.loss, fl.grpo_loss(fl.LogProbs(logps), y, a * each, **named).loss)
    kept = torch.rand(4, 6) > 0.5
    flags, numbers = (fl.grpo_loss(fl.LogProbs(logps), y, a, weights=x, **named).loss for x in (kept, kept.double()))
    torch.testing.assert_close(flags, numbers)


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["loss_type"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_weights_bonus_and_mask_match_the_twin(monkeypatch, options, packed):
    """From hidden states, together, for every loss type; log-probs of the rollout that are not finite among them."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    made = Batch("grpo_loss", "grpo", packed)
    cu = {n: x for n, x in made.options.items() if n == "cu_seqlens"}
    made.options = {**options, **cu, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.05}
    rollout = made.extra["old_logps"] + 0.3 * torch.randn_like(made.extra["old_logps"])
    rollout.view(-1)[::5] = math.nan
    made.extra["rollout_logps"], made.extra["weights"] = rollout, torch.rand_like(rollout)
    made.compare("hidden", "hidden")


def test_off_policy_sequences():
    """Of two sequences whose policy fell by 0.5 a token, the one with an advantage below 0 is left out."""
    logps = torch.full((2, 3), -2.0, requires_grad=True)
    old, y = logps.detach() + 0.5, torch.zeros(2, 3, dtype=torch.long)
    named = {"old_logps": old, "shift": False, "off_policy_mask_threshold": 0.4, "epsilon": 0.9}
    (g,) = torch.autograd.grad(fl.grpo_loss(fl.LogProbs(logps), y, torch.tensor([1.0, -1.0]), **named).loss, logps)
    assert g[0].all() and not g[1].any()
    near = fl.grpo_loss(fl.LogProbs(logps), y, torch.tensor([1.0, -1.0]), rollout_logps=old - 0.2, **named)
    assert torch.autograd.grad(near.loss, logps)[0][1].all()


def test_dual_clip_is_delta():
    """min(max(...), -c A) where A < 0, as verl and OpenRLHF write it."""
    logps, old, _, y, a = batch()
    mask = y != -100
    old = old - 2 * torch.randn_like(old).abs()
    ratio = (logps - old).exp()
    token = torch.maximum(-ratio * a[:, None], -ratio.clamp(0.8, 1.28) * a[:, None])
    token = torch.where(a[:, None] < 0, torch.minimum(token, -3.0 * a[:, None]), token)
    named = {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 3.0, "shift": False}
    out = fl.grpo_loss(fl.LogProbs(logps), y, a, old_logps=old, **named)
    truth = (token * mask).sum() / mask.sum()
    torch.testing.assert_close(out.loss, truth)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps), torch.autograd.grad(truth, logps))


Z, Y, A = torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.long), torch.ones(3)
P = torch.zeros(3, 4)
BAD = [
    (lambda: fl.grpo_loss(Z, Y, A[:2], shift=False), ValueError, r"advantages: expected \[3\] or \[3, 4\] on cpu, got \[2\]"),
    (lambda: fl.grpo_loss(Z, Y, A[:, None], shift=False), ValueError, r"advantages: expected \[3\] or \[3, 4\]"),
    (lambda: fl.grpo_loss(Z, Y, P, shift=True), ValueError, r"advantages: expected \[3\] or \[3, 3\]"),
    (lambda: fl.grpo_loss(Z, Y, A.long(), shift=False), TypeError, "advantages: expected a float tensor, got torch.int64"),
    (lambda: fl.grpo_loss(Z, Y, None, shift=False), TypeError, "advantages: expected a float tensor, got NoneType"),
    (lambda: fl.grpo_loss(Z, Y, A, old_logps=A, shift=False), ValueError, r"old_logps: expected \[3, 4\] on cpu, got \[3\]"),
    (lambda: fl.grpo_loss(Z[0], Y[0], A, shift=False), ValueError, r"labels: expected \[S, T\]"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="ppo", shift=False), ValueError,
     "loss_type: unknown name 'ppo'; known: grpo, dr_grpo, bnpo"),
    (lambda: fl.grpo_loss(Z, Y, A, importance="gspo", shift=False), ValueError,
     "importance: expected one of token, sequence, got 'gspo'"),
    (lambda: fl.grpo_loss(Z, Y, A, epsilon=-0.1, shift=False), ValueError, "epsilon: expected a finite number >= 0, got -0.1"),
    (lambda: fl.grpo_loss(Z, Y, A, epsilon_high="x", shift=False), ValueError, "epsilon_high: expected a finite number >= 0"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="cispo", shift=False), ValueError,
     "epsilon_high: needed for loss_type='cispo', got None"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="cispo", epsilon_high=0.0, shift=False), ValueError,
     "epsilon_high: expected a finite number > 0"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="cispo", epsilon_high=2.0, delta=3.0, shift=False), ValueError,
     "delta: loss_type='cispo' does not read it, but grpo, dr_grpo.*got 3.0"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="sapo", epsilon=0.1, shift=False), ValueError,
     "epsilon: loss_type='sapo' does not read it"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="vespo", importance="sequence", shift=False), ValueError,
     "importance: loss_type='vespo' does not read it, but grpo"),
    (lambda: fl.grpo_loss(Z, Y, A, vespo_k_pos=2.0, shift=False), ValueError,
     "vespo_k_pos: loss_type='grpo' does not read it, but vespo; got 2.0"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="sapo", sapo_temperature_neg=0.0, shift=False), ValueError,
     "sapo_temperature_neg: expected a finite number > 0"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="dppo_tv", shift=False), ValueError, "epsilon: needed for loss_type='dppo_tv'"),
    (lambda: fl.grpo_loss(Z, Y, A, weights=P[:2], shift=False), ValueError, r"weights: expected \[3\] or \[3, 4\]"),
    (lambda: fl.grpo_loss(Z, Y, A, weights=Y, shift=False), TypeError,
     "weights: expected a float or bool tensor, got torch.int64"),
    (lambda: fl.grpo_loss(Z, Y, A, rollout_logps=P, shift=False), ValueError,
     "rollout_logps: is for off_policy_mask_threshold, which is None"),
    (lambda: fl.grpo_loss(Z, Y, A, off_policy_mask_threshold=-1.0, shift=False), ValueError,
     "off_policy_mask_threshold: expected a finite number >= 0"),
    (lambda: fl.grpo_loss(fl.LogProbs(P), Y, A, entropy_coef=0.1, shift=False), ValueError, "entropy"),
    (lambda: fl.grpo_loss(Z, Y, A, delta=1.1, shift=False), ValueError,
     r"delta: expected a number > 1 \+ epsilon_high = 1.2, got 1.1"),
    (lambda: fl.grpo_loss(Z, Y, A, beta=0.1, shift=False), ValueError, "ref: needed for beta=0.1, got None"),
    (lambda: fl.grpo_loss(Z, Y, A, ref=fl.LogProbs(A), shift=False), ValueError,
     r"ref: expected fl.LogProbs \[3, 4\].*got \[3\]"),
    (lambda: fl.grpo_loss(Z, Y, A, ref=Z, kl="k4", shift=False), ValueError,
     "kl: expected 'k1', 'k2', 'k3' or the name of a divergence"),
    (lambda: fl.grpo_loss(Z, Y, A, ref=Z, kl=None, shift=False), TypeError,
     "kl: expected 'k1', 'k2', 'k3' or the name of a divergence"),
    (lambda: fl.grpo_loss(Z, Y, A, ref=fl.LogProbs(P), kl="reverse_kl", beta=0.1, shift=False), ValueError,
     "'reverse_kl' needs ref as"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="dr_grpo", shift=False), ValueError,
     "max_completion_length: needed for loss_type='dr_grpo', got None"),
    (lambda: fl.grpo_loss(Z, Y, A, max_completion_length=9, shift=False), ValueError,
     "max_completion_length: loss_type='grpo' does not read it, but dr_grpo; got 9"),
    (lambda: fl.grpo_loss(Z, Y, A, reduction="avg", shift=False), ValueError, "reduction: expected one of mean, sum, none"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="dapo", reduction="sum", num_items=3, shift=False), ValueError,
     "num_items: only goes with"),
    (lambda: fl.grpo_loss(Z, Y, A, loss_type="dapo", num_items=-1, shift=False), ValueError,
     "num_items: expected a finite number >= 0"),
    (lambda: fl.grpo_loss(Z, Y, A, loss="dapo", shift=False), TypeError, "unknown option 'loss'; did you mean 'loss_type'"),
    (lambda: fl.grpo_loss(Z, Y, A > 0, shift=False), TypeError, "advantages: expected a float tensor, got torch.bool"),
    (lambda: fl.grpo_loss(Z, Y, A, old_logps=P > 0, shift=False), TypeError,
     "old_logps: expected a float tensor, got torch.bool"),
    (lambda: fl.grpo_loss(Z, Y, A, rollout_logps=P > 0, off_policy_mask_threshold=1.0, shift=False), TypeError,
     "rollout_logps: expected a float tensor, got torch.bool"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
