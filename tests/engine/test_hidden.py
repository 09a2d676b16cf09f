"""fl.Hidden in token_stats: every plan against the float64 twin, on both backends."""

import random

import pytest
import torch
from helpers import (
    EPS,
    asking,
    compare_sources,
    doubles,
    gradients_of,
    hidden_leaves,
    hidden_source,
    labels_for,
    least_workspace,
    outputs,
    products,
    relative,
    seed_of,
    seeded,
)
from hidden_calls import (
    NAMES,
    PAIR_PLANS,
    PLANS,
    SLICED,
    both_sides,
    cases,
    frozen_head,
    judge_dpo,
    tight,
    two_sources,
)

import fused_losses as fl
from fused_losses.cli.memory_probe import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- token_stats -------------------------------------------------------------------------------------------------------


def random_call(r, plan, small, device):
    """leaves, a function from leaves to both sources, labels, options, and how to carry it out, all drawn from r."""
    n = r.choice([0, 1, 2, 3] if small else [0, 1, 2, 5, 33, 150])
    vocab = r.choice([1, 3, 37, 150] if small else [1, 3, 37, 515, 1300])
    lead = r.choice([(n,), (n,), (2, n), (n, 1), ()])
    leaves, heads = [], []
    for _ in ("policy", "ref"):
        shape = (lead, r.choice([1, 5, 16, 33]), vocab + r.choice([0, 0, 1, 9]))
        leaves += hidden_leaves(*shape, device, rank=r.choice([0, 0, 1, 4]), bias=r.random() < 0.5)
        softcap = r.choice([None, None, 4.0])
        heads.append({"softcap": softcap, "scale": r.choice([1.0, 0.6]), "temperature": r.choice([1.0, 0.8])})
        heads[-1]["valid_vocab"] = vocab
    for i, x in enumerate(leaves):
        if x is not None:
            x.requires_grad_(i == 0 or (plan != "frozen_head" and r.random() < (0.7 if i < 5 else 0.3)))
    if plan != "frozen_head" and r.random() < 0.3:
        leaves[0].requires_grad_(not asking(leaves[1:]))

    def build(leaves):
        return hidden_source(leaves[:5], **heads[0]), hidden_source(leaves[5:], **heads[1])

    y = labels_for(lead, vocab, device, masked=r.random() < 0.6)
    names = NAMES if r.random() < 0.4 else r.sample([*NAMES, "js(beta=0.2)", "alpha(a=0.3)"], r.randint(0, 3))
    if vocab == 1:  # z = w but for rounding: a slope of either sign
        names = [n for n in names if n != "total_variation"]
    options = {"divergence": names, "entropy": r.random() < 0.6, "shift": bool(lead) and r.random() < 0.3}
    options["collision"] = r.random() < 0.6
    how = {"plan": plan, "static_shapes": r.random() < 0.4}
    policy, ref = build(leaves)
    fewest = least_workspace(lambda bytes: fl.token_stats(policy, y, ref, workspace=bytes, **how, **options))
    fewest *= 2 if plan == "frozen_head" else 1
    few = (fewest, int(1.5 * fewest), 10 * fewest) if y.numel() * vocab <= 16 * (20 if small else 300) else ()
    how["workspace"] = r.choice([*few, 200 * fewest, None])
    return leaves, build, y, options, how


def drawn(plans, seeds):
    return [(plan, seed) for plan in plans for seed in range(seeds)]


@cases(drawn([p for p in PLANS if p != "on_chip"], 10), drawn(PLANS, 3), name="drawn")
def test_any_shape_and_option(backend, device, poison, drawn):
    """Sizes that nothing divides, no rows, one token, H and padding of each side its own, any leaves that ask for
    gradients, in the fewest bytes that do or in many."""
    plan, seed = drawn
    seeded(seed)
    r = random.Random(f"{plan} {seed_of(seed)}")
    leaves, build, y, options, how = random_call(r, plan, backend == "triton", device)
    tolerance = 3e-5 if plan == "on_chip" else 1e-5  # its logits are not quite those of its backward
    compare_sources(build, leaves, y, tolerance, each=backend == "torch", how=how, **options)


@pytest.mark.parametrize("name", NAMES)
@cases(["frozen_head", "keep_logits", "vocab_chunks"], ["frozen_head"])
def test_each_divergence_alone(backend, device, plan, name):
    """Both sides' gradients, in slices of 16 tokens (or, where the logits are kept, at once)."""
    leaves = both_sides((2,), device, vocab=19, rank=0, ref_grad=plan != "frozen_head")
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.tensor([17, 3], device=device)
    policy, ref = two_sources(leaves)
    how = tight(plan, lambda **how: fl.token_stats(policy, y, ref, divergence=name, shift=False, **how))
    compare_sources(two_sources, leaves, y, each=backend == "torch", how=how, divergence=name)


def one_source(kind, leaves):
    if leaves[0] is None:
        return None
    return {
        "hidden": lambda: hidden_source(leaves),
        "logits": lambda: leaves[0],
        "logps": lambda: fl.LogProbs(leaves[0]),
    }[kind]()


def one_kind(kind, lead, vocab, device, grad):
    """Five leaves of a source of this kind."""
    if kind == "hidden":
        return [x if x is None else x.requires_grad_(grad) for x in hidden_leaves(lead, 5, vocab, device, rank=2)]
    shape = (*lead, vocab) if kind == "logits" else lead
    x = None if kind is None else (torch.randn(shape, device=device) - 2).requires_grad_(grad)
    return [x, None, None, None, None]


MIXED = [("hidden", "logits"), ("logits", "hidden"), ("hidden", "logps"), ("logps", "hidden"), ("hidden", None)]


@pytest.mark.parametrize("ref_grad", [False, True])
@pytest.mark.parametrize(("policy", "ref"), MIXED)
def test_any_source_with_any_other(backend, device, policy, ref, ref_grad):
    leaves = [*one_kind(policy, (2, 3), 37, device, True), *one_kind(ref, (2, 3), 37, device, ref_grad)]
    build = lambda leaves: (one_source(policy, leaves[:5]), one_source(ref, leaves[5:]))  # noqa: E731
    y = labels_for((2, 3), 37, device)
    both = "logps" not in (policy, ref) and ref is not None
    options = {"divergence": ["forward_kl", "js"] if both else None, "entropy": policy != "logps"}
    hows = ({"plan": "vocab_chunks", "workspace": 6000}, {"plan": "vocab_chunks", "static_shapes": True}, {})
    for how in hows if backend == "torch" else hows[:1]:
        compare_sources(build, leaves, y, each=backend == "torch", how=how, **options)
    if policy == "hidden" and not ref_grad and backend == "torch":
        leaves[:5] = frozen_head(leaves[:5])
        compare_sources(build, leaves, y, how={"plan": "frozen_head", "workspace": 12000}, **options)


def test_logits_beside_hidden_states_need_no_common_dtype(backend, device):
    """A bfloat16 policy, float32 logits of the reference, and the other way round."""
    y = labels_for((4,), 37, device)
    leaves = hidden_leaves((4,), 5, 37, device, dtype=torch.bfloat16)
    leaves += [torch.randn(4, 37, device=device).requires_grad_(), None, None, None, None]
    for order in (1, -1):
        build = lambda leaves, order=order: (hidden_source(leaves[:5]), fl.Logits(leaves[5]))[::order]  # noqa: E731
        stats = fl.token_stats(
            *build(leaves)[:1], y, build(leaves)[1], divergence="js", plan="vocab_chunks", shift=False
        )
        exact = doubles(leaves)
        truth = fl.reference.token_stats(*build(exact)[:1], y, build(exact)[1], divergence="js", shift=False)
        assert relative(stats.divergence["js"], truth.divergence["js"]) <= 1e-5
        found = gradients_of(stats.divergence["js"].sum(), leaves)
        for g, t, x in zip(found, gradients_of(truth.divergence["js"].sum(), exact), asking(leaves), strict=True):
            assert g.dtype == x.dtype and relative(g, t) <= max(1e-5, EPS[x.dtype])  # one rounding


VIEWS = {
    "sliced time": ((2, 5, 6), lambda t, x, w, c, a, b: fl.Hidden(t[:, 1:-1], w, c)),
    "permuted hidden states": ((3, 2, 6), lambda t, x, w, c, a, b: fl.Hidden(t.transpose(0, 1), w, c)),
    "a part of the hidden states": ((2, 3, 9), lambda t, x, w, c, a, b: fl.Hidden(t[..., 2:8], w, c)),
    "every other feature": ((2, 3, 12), lambda t, x, w, c, a, b: fl.Hidden(t[..., ::2], w, c, lora=(a, b))),
    "expanded hidden states": ((1, 3, 6), lambda t, x, w, c, a, b: fl.Hidden(t.expand(2, 3, 6), w, c)),
    "transposed weight": ((6, 37), lambda t, x, w, c, a, b: fl.Hidden(x, t.T, c)),
    "a part of the weight": ((80, 9), lambda t, x, w, c, a, b: fl.Hidden(x, t[3:40, 2:8], c)),
    "every other row of the weight": ((74, 6), lambda t, x, w, c, a, b: fl.Hidden(x, t[::2], c)),
    "expanded weight": ((37, 1), lambda t, x, w, c, a, b: fl.Hidden(x, t.expand(37, 6), c)),
    "every other bias": ((74,), lambda t, x, w, c, a, b: fl.Hidden(x, w, t[::2])),
    "expanded bias": ((1,), lambda t, x, w, c, a, b: fl.Hidden(x, w, t.expand(37))),
    "transposed factors": ((6, 2), lambda t, x, w, c, a, b: fl.Hidden(x, w, c, lora=(t.T, b, 0.7))),
    "a part of the factors": ((40, 5), lambda t, x, w, c, a, b: fl.Hidden(x, w, c, lora=(a, t[2:39, 1:3], 0.7))),
}


NOT_FROZEN = [w for w in VIEWS if len(VIEWS[w][0]) < 3]


@cases(
    [(p, w) for p in PAIR_PLANS for w in VIEWS if not (p == "on_chip" or (p == "frozen_head" and w in NOT_FROZEN))],
    [(p, w) for p in PAIR_PLANS for w in VIEWS if p == "on_chip"],  # others see tiles, whatever these are made from
    name="view",
)
def test_strides(backend, device, view):
    """Any view, no copies asked of the caller."""
    plan, what = view
    shape, make = VIEWS[what]
    leaves = [(torch.randn(shape, device=device) * 0.7).requires_grad_(), *hidden_leaves((2, 3), 6, 37, device, rank=2)]
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    build = lambda leaves: (make(*leaves), None)  # noqa: E731
    y = labels_for((2, 3), 37, device)
    if plan == "on_chip" and what in ("transposed weight", "expanded weight"):
        with pytest.raises(ValueError, match="plan: 'on_chip' is not possible here: .*contiguous"):
            fl.token_stats(build(leaves)[0], y, plan=plan, shift=False)
        return
    if plan == "row_blocks":
        judge_dpo(build, leaves, y, how={"plan": "row_blocks"}).gradients(what, lambda out: out.loss)
    else:
        compare_sources(build, leaves, y, each=False, how={"plan": plan}, entropy=True)


@pytest.mark.parametrize("policy", ["hidden", "logits"])
def test_strides_of_logits_beside_hidden_states(backend, device, policy):
    """Transposed, sliced and expanded logits of one side."""
    for shape, view in [  # the first two on both backends
        ((37, 3, 2), lambda t: t.permute(2, 1, 0)),
        ((3, 3, 40), lambda t: t[1:, :, ::2][..., :19].repeat(1, 1, 2)[..., :37]),
        ((1, 3, 37), lambda t: t.expand(2, 3, 37)),
        ((2, 4, 45), lambda t: t[:, 1:, 5:42]),
    ][: 4 if backend == "torch" else 2]:
        leaves = [torch.randn(shape, device=device).requires_grad_(), *hidden_leaves((2, 3), 5, 37, device)]

        def build(leaves, view=view):
            return (view(leaves[0]), hidden_source(leaves[1:]))[:: 1 if policy == "logits" else -1]

        y = labels_for((2, 3), 37, device)
        compare_sources(
            build, leaves, y, each=False, how={"plan": "vocab_chunks", "workspace": 6000}, divergence="forward_kl"
        )


@cases(triton=["vocab_chunks", "on_chip"])
def test_shift_is_the_causal_shift(backend, device, plan):
    """The last position is projected nowhere and gets no gradient."""
    leaves = both_sides((2, 4), device, rank=0)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((2, 4), 41, device)
    policy, ref = two_sources(leaves)
    cut = lambda s: fl.Hidden(s.hidden[:, :-1], s.weight, s.bias)  # noqa: E731
    options = {"divergence": ["forward_kl", "js"], "entropy": True, "plan": plan}
    inside = outputs(fl.token_stats(policy, y, ref, shift=True, **options))
    outside = outputs(fl.token_stats(cut(policy), y[:, 1:], cut(ref), **options, shift=False))
    weight = torch.randn(2, 3, device=device)
    for key, value in outside.items():
        torch.testing.assert_close(inside[key], value, rtol=1e-6, atol=1e-6, msg=key)
    total = lambda found: sum((x * weight).sum() for k, x in found.items() if k != "ref_logps")  # noqa: E731
    for g, t in zip(gradients_of(total(inside), leaves), gradients_of(total(outside), leaves), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(total(inside), leaves[0])[0][:, -1].any()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0)], ids=str)
@cases()
def test_no_rows(backend, device, plan, lead, shift):
    leaves = both_sides(lead, device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.zeros(lead, dtype=torch.long, device=device)
    ours, _ = compare_sources(
        two_sources, leaves, y, how={"plan": plan}, divergence=["forward_kl", "js"], entropy=True, shift=shift
    )
    assert ours.logps.shape == (y[..., 1:] if shift else y).shape


@pytest.mark.parametrize("static", [False, True])
@cases()
def test_all_masked(backend, device, poison, plan, static):
    leaves = both_sides((3,), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.full((3,), -100, device=device)
    policy, ref = two_sources(leaves)
    stats = fl.token_stats(policy, y, ref, divergence=NAMES, entropy=True, plan=plan, static_shapes=static, shift=False)
    for name, x in outputs(stats).items():
        assert torch.equal(x, torch.zeros(3, device=device)), name
    assert not stats.correct.any() and not stats.mask.any()
    for g in gradients_of(sum(x.sum() for x in outputs(stats).values()), leaves):
        assert not g.any()


@cases(triton=["vocab_chunks", "frozen_head", "on_chip"])
def test_one_token_vocabulary(backend, device, plan):
    leaves = both_sides((3,), device, vocab=1)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    policy, ref = two_sources(leaves)
    y = torch.zeros(3, dtype=torch.long, device=device)
    stats = fl.token_stats(policy, y, ref, divergence=NAMES, entropy=True, plan=plan, shift=False)
    for name, x in outputs(stats).items():
        assert name == "lse" or x.abs().max() <= 1e-6, name
    smooth = [
        x for n, x in stats.divergence.items() if n != "total_variation"
    ]  # whose slope there is a matter of rounding
    for g in gradients_of(stats.logps.sum() + stats.entropy.sum() + sum(smooth).sum(), leaves):
        assert g.abs().max() <= 1e-5


FEW = ["reverse_kl", "jeffreys", "js", "pearson_chi2", "neyman_chi2"]  # one of each kind


@cases(triton=SLICED)
def test_suppressed_tokens(backend, device, plan):
    """A bias of -inf on both sides, over a whole slice and at single tokens: the tokens are not there."""
    names = NAMES if backend == "torch" else FEW
    leaves = both_sides((3,), device, vocab=60, rank=0)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    there = torch.ones(60, dtype=torch.bool, device=device)
    there[:20], there[33], there[59] = False, False, False
    with torch.no_grad():
        leaves[2][~there], leaves[7][~there] = -torch.inf, -torch.inf
    y = torch.tensor([21, 40, -100], device=device)
    policy, ref = two_sources(leaves)
    options = {"divergence": names, "entropy": True}
    stats = fl.token_stats(
        policy,
        y,
        ref,
        **options,
        **tight(plan, lambda **how: fl.token_stats(policy, y, ref, **options, **how, shift=False)),
        shift=False,
    )
    exact = doubles(leaves)
    parts = [x if i in (0, 5) or x is None else x[there] for i, x in enumerate(exact)]
    place = torch.where(y == -100, -100, there.cumsum(0)[y.clamp(min=0)] - 1)
    truth = fl.reference.token_stats(two_sources(parts)[0], place, two_sources(parts)[1], **options, shift=False)
    for name, true in outputs(truth).items():
        assert relative(outputs(stats)[name], true) <= 1e-5, name
    for group in [[n] for n in outputs(truth)] if backend == "torch" else [["logps", "entropy", *names]]:
        if outputs(stats)[group[0]].requires_grad:
            total = lambda found, group=group: sum(outputs(found)[n].sum() for n in group)  # noqa: E731
            wanted = gradients_of(total(truth), exact)
            for g, t in zip(gradients_of(total(stats), leaves), wanted, strict=True):
                assert t is None or relative(g, t) <= 3e-5, f"{group}: {relative(g, t):.1e}"


@cases(["keep_logits", *SLICED], SLICED)
@pytest.mark.parametrize("side", ["policy", "ref"])
def test_tokens_suppressed_on_one_side(backend, device, plan, side):
    """Values are infinite where the truth is; gradients stay finite, and are those that logits give."""
    names = NAMES if backend == "torch" else FEW
    leaves = frozen_head(both_sides((3,), device, vocab=60, rank=0))
    with torch.no_grad():
        leaves[2 if side == "policy" else 7][:20] = -torch.inf  # a whole slice, the first
    y = torch.tensor([21, 40, 59], device=device)
    policy, ref = two_sources(leaves)
    stats = fl.token_stats(
        policy,
        y,
        ref,
        divergence=names,
        **tight(plan, lambda **how: fl.token_stats(policy, y, ref, divergence=names, **how, shift=False)),
        shift=False,
    )
    exact = two_sources(doubles(leaves))
    truth = fl.reference.token_stats(exact[0], y, exact[1], divergence=names, shift=False)
    z, w = (fl.reference.stats.projected(s).detach().requires_grad_() for s in (policy, ref))
    plain = fl.token_stats(z, y, w, divergence=names, shift=False)
    for name in names:
        assert torch.equal(stats.divergence[name].isinf(), truth.divergence[name].isinf()), name
    for group in [[n] for n in names] if backend == "torch" else [names]:
        (g,) = torch.autograd.grad(sum(stats.divergence[n].sum() for n in group), leaves[0], retain_graph=True)
        (dz,) = torch.autograd.grad(sum(plain.divergence[n].sum() for n in group), z, retain_graph=True)
        error = relative(g, dz @ leaves[1])
        assert g.isfinite().all() and error <= 3e-5, f"{group}: {error:.1e}"


@cases([(p, n) for p in SLICED for n in NAMES if p != "on_chip"], [(p, n) for p in SLICED for n in FEW], name="what")
def test_maxima_that_rise_far_from_slice_to_slice(backend, device, what):
    """One side's logits rise by more than an exponential in float32 can carry, then the other's, then both."""
    plan, name = what
    leaves = frozen_head(both_sides((2,), device, vocab=64, rank=0, size=0.3))
    with torch.no_grad():
        leaves[2][16:32] += 100.0
        leaves[7][32:48] += 100.0
        leaves[2][48:] += 250.0
        leaves[7][48:] += 250.0
    y = torch.tensor([50, 63], device=device)
    policy, ref = two_sources(leaves)
    how = tight(plan, lambda **how: fl.token_stats(policy, y, ref, divergence=name, **how, shift=False), times=1)
    compare_sources(two_sources, leaves, y, 3e-5, how=how, divergence=name)


@cases(triton=["vocab_chunks", "on_chip"])
def test_labels_of_any_kind(backend, device, plan):
    """Any integer type and stride; an ignore_index that is a token, too."""
    leaves = frozen_head(both_sides((2, 3), device, rank=0))
    y = torch.tensor([[3, 40, 0], [17, 3, 16]], device=device)
    policy, ref = two_sources(leaves)
    options = {"divergence": "forward_kl", "entropy": True}
    how = tight(plan, lambda **how: fl.token_stats(policy, y, ref, **options, **how, shift=False))
    expected = outputs(fl.token_stats(policy, y, ref, **options, **how, shift=False))
    wide = torch.stack([y, y], -1).mT.contiguous()
    for other in (y.int(), y.short(), y.to(torch.uint8), y.T.contiguous().T, wide[:, 1], wide.mT[..., 0]):
        for key, x in outputs(fl.token_stats(policy, other, ref, **options, **how, shift=False)).items():
            assert torch.equal(x, expected[key]), key
    compare_sources(two_sources, leaves, y, 3e-5, each=False, how=how, ignore_index=3, **options)


def test_correct_is_the_argmax_over_all_slices(backend, device):
    x, weight = torch.randn(12, 4, device=device), torch.randn(50, 4, device=device)
    y = (x @ weight.T).argmax(-1)
    y[::3] = (y[::3] + 1) % 50
    stats = fl.token_stats(
        fl.Hidden(x, weight), y, plan="vocab_chunks", workspace=1600 if backend == "torch" else 800, shift=False
    )
    assert torch.equal(stats.correct, (x @ weight.T).argmax(-1) == y)


def test_one_graph_walked_twice_and_in_parts(backend, device):
    leaves = frozen_head(both_sides((3,), device, rank=0))
    y = labels_for((3,), 41, device)
    for plan in ("vocab_chunks", "keep_logits", "frozen_head"):
        policy, ref = two_sources(leaves)
        stats = fl.token_stats(policy, y, ref, divergence="js", entropy=True, plan=plan, shift=False)
        a, b = stats.logps.sum(), (stats.divergence["js"] * 3 + stats.entropy).sum()
        first, again = (torch.autograd.grad(a + b, leaves[0], retain_graph=True)[0] for _ in range(2))
        parts = torch.autograd.grad(a, leaves[0], retain_graph=True)[0] + torch.autograd.grad(b, leaves[0])[0]
        assert torch.equal(first, again)
        torch.testing.assert_close(first, parts)


# ---- the head ----------------------------------------------------------------------------------------------------------


@cases(["vocab_chunks", "keep_logits", "row_blocks"], ["row_blocks"])
def test_tied_embedding(backend, device, plan):
    """One tensor as embedding and head: both gradients land in it, and add up over micro-batches."""
    table = (torch.randn(41, 6, device=device) * 0.4).requires_grad_()
    ids = torch.randint(0, 41, (2, 3), device=device)
    table64 = doubles([table])[0]

    def run(f, table):
        source = fl.Hidden(torch.tanh(table[ids]), table)
        how = {"plan": plan} if f is fl else {}
        return (
            f.dpo_loss(source, ids, None, shift=True, **how).loss
            if plan == "row_blocks"
            else (f.token_stats(source, ids, shift=True, **how).logps.sum())
        )

    for _ in range(2):
        run(fl, table).backward()
    (2 * run(fl.reference, table64)).backward()
    assert relative(table.grad, table64.grad) <= 1e-5


def test_one_head_on_both_sides(backend, device):
    """The reference's hidden states under the policy's own head."""
    leaves = [*hidden_leaves((3,), 6, 41, device), *hidden_leaves((3,), 6, 41, device)]
    build = lambda t: (hidden_source(t[:5]), fl.Hidden(t[5], t[1], t[2]))  # noqa: E731
    y = labels_for((3,), 41, device)
    for plan in ("vocab_chunks", "keep_logits"):
        compare_sources(build, leaves, y, each=backend == "torch", how={"plan": plan}, divergence=["reverse_kl", "js"])


LEAVES = ("hidden", "weight", "bias", "a", "b")
WHOSE = [
    ("hidden",),
    ("weight",),
    ("bias",),
    ("a",),
    ("b",),
    ("a", "b"),
    ("hidden", "weight"),
    ("hidden", "a", "b"),
    LEAVES,
]


@cases(
    [("frozen_head", ("hidden",)), *((p, w) for p in ("vocab_chunks", "keep_logits", "row_blocks") for w in WHOSE)],
    [("on_chip", LEAVES), ("on_chip", ("b",)), ("row_blocks", ("hidden", "a", "b"))], name="what",
)  # fmt: skip
def test_nothing_is_computed_for_what_is_frozen(backend, device, what):
    """Gradients only where asked, and of the products of N rows, V columns and H features only those they need."""
    plan, whose = what
    leaves = hidden_leaves((2, 3), 7, 41, device, rank=2)
    for name, x in zip(LEAVES, leaves, strict=True):
        x.requires_grad_(name in whose)
    y = torch.randint(0, 41, (2, 3), device=device)

    def step():
        source = hidden_source(leaves)
        if plan == "row_blocks":
            fl.dpo_loss(source, y, None, plan="row_blocks", shift=False).loss.backward()
        else:
            fl.token_stats(source, y, plan=plan, shift=False).logps.sum().backward()

    shapes = [sorted(s) for s in products(step)]
    for name, x in zip(LEAVES, leaves, strict=True):
        assert (x.grad is not None) == (name in whose), name
    logits = 2 if plan == "vocab_chunks" else 1  # a tile kernel makes them itself in the forward
    assert sum(s == [6, 7, 41] for s in shapes) == logits + ("hidden" in whose) + ("weight" in whose), shapes
    to_factors = bool({"hidden", "a"} & {*whose}) + ("b" in whose)
    assert sum(s == [2, 6, 41] for s in shapes) == logits + to_factors, shapes


def test_no_memory_for_the_gradient_of_a_frozen_weight(device, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x, weight = torch.randn(4, 512).requires_grad_(), torch.randn(4096, 512)
    y = torch.randint(0, 4096, (4,))
    for plan in ("vocab_chunks", "frozen_head", "keep_logits"):
        source, how = fl.Hidden(x, weight), {"plan": plan, "workspace": 1 << 21}
        run = lambda: fl.token_stats(source, y, **how, shift=False).logps.sum().backward()  # noqa: B023, E731
        assert peak_bytes(run) < weight.numel() * 4 / 2, plan
