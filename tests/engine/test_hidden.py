"""fl.Hidden in token_stats and the preference losses: every plan against the float64 twin, on both backends."""

import random
from functools import partial

import pytest
import torch
from helpers import (
    EPS,
    Judge,
    asking,
    compare_sources,
    doubles,
    generator_of,
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
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses import divergences
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.core.layout import Grads, StatsSpec
from fused_losses.engine import hidden_ops, planner
from fused_losses.engine.sides import InputFlags, Inputs, Wanted

NAMES = divergences.names()
LINKS = divergences.linkable()
OPS = torch.ops.fused_losses


pytestmark = pytest.mark.usefixtures("one_thread")


def tile_kernel():
    """Whether the Triton backend has a kernel behind plan="on_chip"."""
    try:
        from fused_losses.kernels import launch
    except ImportError:  # no Triton
        return False
    return hasattr(launch, "tile_states")


PLANS = ["auto", *(k for k in planner.KINDS if k != "row_blocks" and (k != "on_chip" or tile_kernel()))]
PAIR_PLANS = [*PLANS, "row_blocks"]


def cases(torch=PLANS, triton=PLANS, name="plan"):
    """Runs a test with each of these plans (or tuples of something) on each backend."""
    pairs = [("torch", x) for x in torch if x != "on_chip"] + [("triton", x) for x in triton]
    ids = ["-".join(map(str, (b, *x) if isinstance(x, tuple) else (b, x))) for b, x in pairs]
    return pytest.mark.parametrize(("backend", name), pairs, indirect=["backend"], ids=ids)


SLICED = [p for p in PLANS if p in ("vocab_chunks", "frozen_head", "on_chip")]  # the vocabulary in pieces


def tight(plan, call, times=2):
    """The plan in few bytes; call(plan=, workspace=)."""
    if plan not in ("vocab_chunks", "frozen_head"):
        return {"plan": plan}
    fewest = least_workspace(lambda bytes: call(plan=plan, workspace=bytes))
    return {
        "plan": plan,
        "workspace": times * fewest * (2 if plan == "frozen_head" else 1),
    }  # frozen keeps up to half of it


def frozen_head(leaves):
    """Only the policy's hidden states ask for a gradient."""
    for x in leaves[1:]:
        if x is not None:
            x.requires_grad_(False)
    return leaves


def both_sides(lead, device, widths=(6, 9), vocab=41, rank=2, ref_grad=False, **options):
    """Ten leaves: policy and reference with a bias and factors each."""
    policy = hidden_leaves(lead, widths[0], vocab, device, rank=rank, **options)
    ref = hidden_leaves(lead, widths[1], vocab, device, rank=rank, **options)
    return [*policy, *(x if x is None else x.requires_grad_(ref_grad) for x in ref)]


def two_sources(leaves, **head):
    return hidden_source(leaves[:5], **head), hidden_source(leaves[5:], **head)


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


def judge_dpo(build, leaves, y, tolerance=1e-5, slack=4.0, how=None, **options):
    """A Judge of fl.dpo_loss: build(leaves) -> policy, ref."""
    options = {"shift": False, **options}

    def call(f, **how):
        return lambda leaves: f.dpo_loss(build(leaves)[0], y, build(leaves)[1], **options, **how)

    return Judge(call(fl, **(how or {})), call(fl.reference), leaves, tolerance, slack)


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


# ---- preference losses -------------------------------------------------------------------------------------------------


PACKED = [0, 3, 3, 7, 9, 14, 15]  # six sequences, one of them empty
REFS = ["hidden", "logits", "tokens", "sequences", None]


def pair_call(kind, packed, device, vocab=29, **options):
    """Leaves, build(leaves) -> policy, ref, labels and options of three pairs; ref gets no gradient."""
    lead = (PACKED[-1],) if packed else (6, 4)
    leaves = hidden_leaves(lead, 5, vocab, device, rank=2)
    y = labels_for(lead, vocab, device)
    options["cu_seqlens"] = torch.tensor(PACKED, device=device) if packed else None
    options["shift"] = not packed
    shape = {"hidden": (*lead, 7), "logits": (*lead, vocab), "sequences": (6,), None: ()}
    given = torch.randn(shape.get(kind, lead if packed else (6, 3)), device=device)
    head = torch.randn(vocab, 7, device=device)
    as_leaves = [*leaves, given - 3 if kind in ("tokens", "sequences") else given, head]

    def build(leaves):
        *policy, given, head = leaves
        refs = {
            "hidden": lambda: fl.Hidden(given, head, softcap=3.0),
            "logits": lambda: fl.Logits(given),
            None: lambda: None,
        }
        return hidden_source(policy, softcap=4.0), refs.get(kind, lambda: fl.LogProbs(given))()

    return as_leaves, build, y, options


ALL_PAIRS = [(p, packed, kind) for p in PAIR_PLANS for packed in (False, True) for kind in REFS]


@cases(
    [c for c in ALL_PAIRS if c[0] != "on_chip"],
    # whence the reference comes is no business of a kernel: padded and packed take turns
    [("row_blocks", i % 2 > 0, kind) for i, kind in enumerate(REFS)] + [(p, True, "hidden") for p in PLANS], name="what",
)  # fmt: skip
def test_preference_loss_matches_the_twin(backend, device, poison, what):
    """Loss, metrics, statistics and gradients: under a factor, walked twice, with the statistics in the loss as well."""
    plan, packed, kind = what
    leaves, build, y, options = pair_call(kind, packed, device, entropy=True, beta=0.3, label_smoothing=0.1)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    options["divergence"] = "js" if kind else "reverse_kl"
    options["ignore_index"] = -100
    policy, ref = build(leaves)
    how = {"plan": plan, "static_shapes": plan != "row_blocks" and packed == (kind in ("hidden", "tokens"))}
    if plan in ("row_blocks", "vocab_chunks", "frozen_head"):
        call = lambda bytes: fl.dpo_loss(policy, y, ref, **options, **how | {"workspace": bytes})  # noqa: E731
        how["workspace"] = 2 * least_workspace(call) + (2000 if plan == "frozen_head" else 0)
    judge = judge_dpo(build, leaves, y, how=how, **options)
    judge.value("loss", lambda out: out.loss)
    assert judge.mine.metrics.keys() == judge.truth.metrics.keys()
    for key in judge.truth.metrics:
        judge.value(key, lambda out, key=key: out.metrics[key])
    for key in outputs(judge.truth.stats):
        if key != "ref_logps" or kind in ("hidden", "logits"):
            judge.value(key, lambda out, key=key: outputs(out.stats)[key])
    assert torch.equal(judge.mine.stats.mask, judge.truth.stats.mask)
    assert torch.equal(judge.mine.stats.correct, judge.truth.stats.correct)
    judge.gradients("three times the loss", lambda out: 3 * out.loss)
    judge.gradients("the loss again", lambda out: out.loss)
    weight = torch.randn(judge.truth.stats.logps.shape, device=device)
    judge.gradients("loss and log-probs", lambda out: out.loss + (out.stats.logps * weight.to(out.loss.dtype)).sum())
    judge.gradients("entropy alone", lambda out: (out.stats.entropy * weight.to(out.loss.dtype)).sum())


@cases(LINKS, ["js", "alpha"], name="key")
def test_every_link_in_row_blocks(backend, device, key):
    leaves, build, y, options = pair_call("hidden", False, device, divergence=key, beta=0.5)
    policy, ref = build(leaves)
    fewest = least_workspace(lambda bytes: fl.dpo_loss(policy, y, ref, plan="row_blocks", workspace=bytes, **options))
    judge = judge_dpo(build, leaves, y, how={"plan": "row_blocks", "workspace": fewest}, **options)
    judge.value("loss", lambda out: out.loss)
    judge.gradients("loss", lambda out: out.loss)


@cases([("row_blocks", False), ("row_blocks", True), ("vocab_chunks", False)], [("row_blocks", True)], name="what")
def test_reductions(backend, device, what):
    plan, packed = what
    leaves, build, y, options = pair_call("hidden", packed, device)
    for reduction, weight in (("none", torch.tensor([0.5, -1.0, 3.0], device=device)), ("sum", 2.0), ("none", 1.0)):
        judge = judge_dpo(build, leaves, y, how={"plan": plan}, reduction=reduction, **options)
        judge.value(reduction, lambda out: out.loss)
        judge.gradients(reduction, lambda out, weight=weight: (out.loss * weight).sum())
    for count in (7, torch.tensor(7, device=device)):
        judge = judge_dpo(build, leaves, y, how={"plan": plan}, num_items=count, **options)
        judge.value("num_items", lambda out: out.loss)
        judge.gradients("num_items", lambda out: out.loss)


@pytest.mark.parametrize("kind", ["tokens", "sequences", "hidden", "logits"])
@cases(["auto", "vocab_chunks", "row_blocks"], ["row_blocks"])
def test_gradient_to_the_reference(backend, device, plan, kind):
    """Given log-probs may learn in any plan; a reference model in all but row blocks, which say so."""
    leaves, build, y, options = pair_call(kind, False, device)
    leaves[5].requires_grad_()
    if plan == "row_blocks" and kind in ("hidden", "logits"):
        with pytest.raises(
            ValueError, match="plan: 'row_blocks' is not possible here: .*reference that needs no gradient"
        ):
            fl.dpo_loss(build(leaves)[0], y, build(leaves)[1], plan="row_blocks", **options)
        return
    judge = judge_dpo(build, leaves, y, how={"plan": plan}, **options)
    judge.gradients("loss", lambda out: out.loss)
    judge.gradients("twice", lambda out: 2 * out.loss)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 1)], ids=str)
@cases(["auto", "vocab_chunks", "row_blocks"], ["auto", "vocab_chunks", "row_blocks"])
def test_empty_batches(backend, device, plan, shape):
    leaves = hidden_leaves(shape, 5, 9, device)
    y = torch.zeros(shape, dtype=torch.long, device=device)
    for shift in (False, True):
        judge = judge_dpo(lambda leaves: (hidden_source(leaves), None), leaves, y, how={"plan": plan}, shift=shift)
        judge.value("loss", lambda out: out.loss)
        judge.gradients("loss", lambda out: out.loss)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    flat = [leaves[0].reshape(-1, 5)[:0], *leaves[1:3]]
    out = fl.dpo_loss(
        fl.Hidden(*flat),
        torch.zeros(0, dtype=torch.long, device=device),
        None,
        cu_seqlens=nothing,
        plan=plan,
        shift=False,
    )
    assert out.loss == 0
    out.loss.backward()


@cases(["auto", "vocab_chunks", "row_blocks"], ["row_blocks"])
def test_pairs_without_a_token(backend, device, poison, plan):
    """A masked pair costs log 2 and gives no gradient, alone in its block or not."""
    leaves, build, y, options = pair_call("hidden", False, device)
    y[1], y[4] = -100, -100
    policy, ref = build(leaves)
    for workspace in (None, 200_000):
        out = fl.dpo_loss(policy, y, ref, reduction="none", plan=plan, workspace=workspace, **options)
        assert abs(out.loss[1].item() - 0.6931472) < 1e-6
        g = torch.autograd.grad(out.loss.sum(), leaves[0])[0]
        assert g.isfinite().all() and not g[1].any() and not g[4].any() and g[0].any()
    out = fl.dpo_loss(policy, torch.full_like(y, -100), ref, plan=plan, **options)
    assert abs(out.loss.item() - 0.6931472) < 1e-6
    assert not any(g.any() for g in gradients_of(out.loss, leaves))


@cases(PAIR_PLANS, ["auto", "row_blocks", "on_chip"] if "on_chip" in PLANS else ["auto", "row_blocks"])
def test_without_gradients(backend, device, plan):
    """Evaluation under no_grad, with the training step's arguments."""
    leaves, build, y, options = pair_call("hidden", False, device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    policy, ref = build(leaves)
    expected = fl.dpo_loss(policy, y, ref, **options).loss
    with torch.no_grad():
        out = fl.dpo_loss(policy, y, ref, plan=plan, **options)
    assert not out.loss.requires_grad and not out.stats.logps.requires_grad
    torch.testing.assert_close(out.loss, expected.detach())


# ---- dtypes ------------------------------------------------------------------------------------------------------------


LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@cases(["frozen_head", "keep_logits", "vocab_chunks"], SLICED)
def test_low_precision_is_never_worse_than_eager(backend, device, plan, dtype):
    """Value and gradients against what eager torch loses in the same dtype; one rounding of a gradient is free."""
    leaves = both_sides((4,), device, vocab=60, dtype=dtype, rank=2, ref_grad=plan != "frozen_head")
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4,), 60, device)
    names = NAMES if backend == "torch" else ["reverse_kl", "js"]

    def call(f, **how):
        options = {"divergence": names, "entropy": True, **how}
        return lambda leaves: f.token_stats(two_sources(leaves)[0], y, two_sources(leaves)[1], **options, shift=False)

    judge = Judge(call(fl, plan=plan), call(fl.reference), leaves, slack=1.0)
    for key in outputs(judge.truth):
        judge.value(key, lambda stats, key=key: outputs(stats)[key])
    judge.tolerance = EPS[dtype]
    for key, value in outputs(judge.truth).items():
        if value.requires_grad and (backend == "torch" or key in ("logps", "js")):
            weight = torch.randn(value.shape, device=device)
            judge.gradients(
                key, lambda stats, key=key, w=weight: (outputs(stats)[key] * w.to(outputs(stats)[key].dtype)).sum()
            )


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_gradients_are_rounded_once(device, monkeypatch, dtype, plan):
    """Summed in float32 over blocks and slices, scaled by the loss's factor of a third, and then rounded."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    leaves = hidden_leaves((6, 5), 16, 600, device, dtype=dtype, rank=4)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.randint(0, 600, (6, 5), device=device)
    build = lambda leaves: (hidden_source(leaves), None)  # noqa: E731
    call = lambda bytes: fl.dpo_loss(hidden_source(leaves), y, None, plan=plan, workspace=bytes, shift=False)  # noqa: E731
    few = (
        2 * least_workspace(call) * (2 if plan == "frozen_head" else 1)
        if plan in ("vocab_chunks", "frozen_head", "row_blocks")
        else None
    )
    judge = judge_dpo(build, leaves, y, how={"plan": plan, "workspace": few})
    wanted = gradients_of(judge.truth.loss, judge.exact)
    for g, t, x in zip(gradients_of(judge.mine.loss, leaves), wanted, asking(leaves), strict=True):
        once = relative(t.to(dtype), t)
        slack = 1.1 if device.type == "cpu" else 3.0  # dz is rounded too where products take no other factors
        assert g.dtype == dtype and relative(g, t) <= slack * once, (
            f"{list(x.shape)}: {relative(g, t) / once:.2f} roundings"
        )


@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_loss_scaling_in_float16(device, monkeypatch, plan):
    """GradScaler's first scale, 65536, is no number in float16; the gradients it makes are."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    leaves = hidden_leaves((2, 3), 16, 60, device, dtype=torch.float16)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = torch.randint(0, 60, (2, 3), device=device)
    judge = judge_dpo(lambda leaves: (hidden_source(leaves), None), leaves, y, 1e-3, how={"plan": plan})
    judge.gradients("scaled", lambda out: out.loss * 65536.0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@cases(["vocab_chunks", "keep_logits", "row_blocks"], ["row_blocks"])
def test_hidden_and_weight_of_different_dtypes(backend, device, dtypes, plan):
    """Each gradient comes in the dtype of its tensor; on a CPU, where factors are never rounded, from exact products."""
    if device.type != "cpu":
        pytest.skip("products of the dtype of the hidden states")
    leaves = [x for x in hidden_leaves((2, 3), 16, 60, device) if x is not None]
    leaves = [x.detach().to(d).requires_grad_() for x, d in zip(leaves, (*dtypes, torch.float32), strict=True)]
    y = labels_for((2, 3), 60, device)
    loss, exact = fl.dpo_loss(fl.Hidden(*leaves), y, None, plan=plan, shift=False).loss, doubles(leaves)
    truth = fl.reference.dpo_loss(fl.Hidden(*exact), y, None, shift=False).loss
    assert relative(loss, truth) <= 1e-6
    for g, t, x in zip(gradients_of(loss, leaves), gradients_of(truth, exact), leaves, strict=True):
        assert g.dtype == x.dtype and relative(g, t) <= max(1e-5, EPS[x.dtype])  # one rounding


@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_float64(device, monkeypatch, plan):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = both_sides((4, 3), device, dtype=torch.float64)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4, 3), 41, device)
    if plan != "row_blocks":
        policy, ref = two_sources(leaves)
        how = tight(
            plan, lambda **how: fl.token_stats(policy, y, ref, divergence=NAMES, entropy=True, **how, shift=False)
        )
        compare_sources(two_sources, leaves, y, 1e-12, how=how, divergence=NAMES, entropy=True)
    judge = judge_dpo(two_sources, leaves, y, 1e-12, how={"plan": plan}, divergence="js")
    judge.value("loss", lambda out: out.loss)
    judge.gradients("loss", lambda out: 3 * out.loss)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [p for p in PAIR_PLANS if p != "on_chip"])
def test_gradcheck(monkeypatch, plan):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves = [x for x in hidden_leaves((2, 2), 3, 7, "cpu", dtype=torch.float64, rank=2)]
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    ref, y = hidden_source(doubles(hidden_leaves((2, 2), 3, 7, "cpu"))), torch.tensor([[1, -100], [6, 0]])
    ref = fl.Hidden(ref.hidden.detach(), ref.weight.detach())

    def run(*leaves):
        if plan == "row_blocks":
            return fl.dpo_loss(hidden_source(leaves), y, ref, plan=plan, shift=False).loss
        stats = fl.token_stats(hidden_source(leaves), y, ref, divergence=NAMES, entropy=True, plan=plan, shift=False)
        return tuple(x for x in outputs(stats).values() if x.requires_grad)

    assert torch.autograd.gradcheck(run, leaves)


@cases(PAIR_PLANS, ["row_blocks", *SLICED])
def test_autocast(backend, device, plan):
    """Float32 leaves under autocast: products in bfloat16, as a linear layer's, and gradients in float32."""
    leaves = both_sides((2, 3), device, rank=0)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((2, 3), 41, device)

    def call(f, **how):
        def run(leaves):
            with torch.autocast(device.type, torch.bfloat16, enabled=leaves[0].dtype != torch.float64):
                return f.dpo_loss(two_sources(leaves)[0], y, two_sources(leaves)[1], **how, shift=False)

        return run

    judge = Judge(call(fl, plan=plan), call(fl.reference), leaves, 2 * EPS[torch.bfloat16], slack=1.0)
    assert judge.mine.loss.dtype == torch.float32
    judge.value("loss", lambda out: out.loss)
    judge.value("log-probs", lambda out: out.stats.logps)
    judge.gradients("loss", lambda out: out.loss)


# ---- numerics ----------------------------------------------------------------------------------------------------------


def sum_errors(monkeypatch, plan, tile):
    """Relative errors of the gradients at hidden states and weight with tiles of this shape, and those of eager code."""
    generator = generator_of(7)
    new = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    leaves = [
        new(64, 32).requires_grad_(),
        (new(16384, 32) * 0.3).requires_grad_(plan != "frozen_head"),
        None,
        None,
        None,
    ]
    y = torch.randint(0, 16384, (64,), generator=generator)
    monkeypatch.setattr(planner, "tile_shape", lambda inputs, budget: planner.Tile(*tile))

    def gradients(f, leaves, **how):
        stats = f.token_stats(hidden_source(leaves), y, entropy=True, **how, shift=False)
        return gradients_of((stats.logps - 0.1 * stats.entropy).sum(), leaves)

    truth = gradients(fl.reference, doubles(leaves))
    found = gradients(fl, leaves, plan=plan), gradients(fl.reference, leaves)
    return [[relative(g, t) for g, t in zip(grads, truth, strict=True)] for grads in found]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["vocab_chunks", "frozen_head"])
def test_errors_do_not_grow_with_the_number_of_slices(monkeypatch, plan):
    """In 1024 slices of 16 tokens, no gradient is less exact than eager code's."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    for slices in (1, 16, 256, 1024):
        errors, eager = sum_errors(monkeypatch, plan, (64, 16384 // slices))
        assert all(e <= 1.05 * b for e, b in zip(errors, eager, strict=True)), (slices, errors, eager)


def test_errors_do_not_grow_with_the_number_of_tiles_in_a_column(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    base, _ = sum_errors(monkeypatch, "vocab_chunks", (64, 2048))
    for rows in (16, 4):
        errors, _ = sum_errors(monkeypatch, "vocab_chunks", (rows, 2048))
        assert all(e <= 1.5 * b for e, b in zip(errors, base, strict=True)), (rows, errors, base)


def test_errors_do_not_grow_with_the_number_of_row_blocks(monkeypatch):
    """Up to the 128 that the planner allows itself."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    generator = generator_of(7)
    new = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    leaves = [new(4096, 16).requires_grad_(), (new(1024, 16) * 0.3).requires_grad_(), None, None, None]
    teacher = [new(4096, 16), new(1024, 16) * 0.3, None, None, None]
    y = torch.randint(0, 1024, (4096,), generator=generator)

    def gradients(f, leaves, teacher, **how):
        options = {"divergence": "forward_kl", "hard": 1.0, **how}
        return gradients_of(
            f.distillation_loss(hidden_source(leaves), y, hidden_source(teacher), **options, shift=False).loss, leaves
        )

    truth = gradients(fl.reference, doubles(leaves), doubles(teacher))
    eager = [relative(g, t) for g, t in zip(gradients(fl.reference, leaves, teacher), truth, strict=True)]
    for blocks in (1, 16, planner.MANY):
        monkeypatch.setattr(planner, "_block_rows", lambda inputs, budget, rows=4096 // blocks: rows)
        found = gradients(fl, leaves, teacher, plan="row_blocks", workspace=1 << 30)
        errors = [relative(g, t) for g, t in zip(found, truth, strict=True)]
        assert all(e <= 1.1 * b for e, b in zip(errors, eager, strict=True)), (blocks, errors, eager)


# ---- bad input ---------------------------------------------------------------------------------------------------------


X, W, Y = torch.zeros(4, 3, 5), torch.zeros(11, 5), torch.zeros(4, 3, dtype=torch.long)
H, ASKS = fl.Hidden(X, W), fl.Hidden(X.clone().requires_grad_(), W)
ALL = fl.Hidden(X.clone().requires_grad_(), W.clone().requires_grad_())
Hidden, stats = fl.Hidden, partial(fl.token_stats, shift=False)


def dpo(policy, labels, ref=None, **options):
    return fl.dpo_loss(policy, labels, ref, shift=False, **options)


BAD = [
    (lambda: stats(Hidden(torch.zeros(4, 3, 11), W), Y), r"policy: .*\[4, 3, 11\].*looks like logits: pass them as fl.Logits"),
    (lambda: stats(H, Y, Hidden(torch.zeros(4, 3, 11), W)), r"ref: .*looks like logits"),
    (lambda: stats(Hidden(X, W.T), Y), r"policy: .*weight looks transposed: pass weight.T"),
    (lambda: stats(H, Y, Hidden(X, W.T)), r"ref: .*weight looks transposed"),
    (lambda: Hidden(X, W[:0]), r"weight: has no elements, shape \[0, 5\].*GatheredParameters"),
    (lambda: Hidden(X, torch.zeros(0)), r"weight: has no elements"),
    (lambda: Hidden(X, W.flatten()), r"weight: expected 2 dimensions, got shape \[55\]"),
    (lambda: Hidden(X, W.long()), "weight: expected float32"),
    (lambda: Hidden(X.tolist(), W), "hidden: expected a tensor, got list"),
    (lambda: Hidden(X, W.to_sparse()), "weight: expected a dense tensor"),
    (lambda: stats(Hidden(X[..., :4], W), Y), r"policy: expected hidden \[..., 5\].*got \[4, 3, 4\]"),
    (lambda: stats(H, Y, Hidden(X[..., :4], W)), r"ref: expected hidden \[..., 5\].*got \[4, 3, 4\]"),
    (lambda: dpo(H, Y, Hidden(X[..., :4], W)), r"ref: expected hidden \[..., 5\]"),
    (lambda: dpo(Hidden(X[..., :4], W), Y, H, plan="row_blocks"), r"policy: expected hidden \[..., 5\]"),
    (lambda: stats(Hidden(X, W, W[:7, 0]), Y), r"policy: expected bias \[11\].*got \[7\]"),
    (lambda: stats(H, Y, Hidden(X, W, W[:7, 0])), r"ref: expected bias \[11\]"),
    (lambda: Hidden(X, W, W), r"bias: expected 1 dimensions"),
    (lambda: stats(Hidden(X, W, lora=(W[:2, :4], W[:, :2])), Y), r"policy: expected lora a \[r, 5\] and b \[11, r\]"),
    (lambda: stats(H, Y, Hidden(X, W, lora=(W[:2], W[:, :3]))), r"ref: expected lora a .*got \[2, 5\] and \[11, 3\]"),
    (lambda: Hidden(X, W, lora=(W[:2], W[:, :2], "1")), "lora scaling: expected a number, got '1'"),
    (lambda: Hidden(X, W, valid_vocab=12), r"valid_vocab: expected an int in \[1, 11\]"),
    (lambda: Hidden(X, W, softcap=0), "softcap: expected a finite number > 0"),
    (lambda: Hidden(X, W, process_group=object()), "process_group: torch.distributed is not initialised"),
    (lambda: stats(H, Y, Hidden(X, torch.zeros(12, 5)), divergence="js"), "ref: .*vocabulary of 11, got 12.*fl.Hidden.*valid"),
    (lambda: stats(H, Y, torch.zeros(4, 3, 12), divergence="js"), "ref: .*vocabulary of 11, got 12.*fl.Logits.*valid_vocab"),
    (lambda: fl.tdpo_loss(H, Y, Hidden(X, torch.zeros(12, 5)), shift=False), "ref: expected the policy's vocabulary of 11"),
    (lambda: stats(H, Y[:2]), r"policy: expected hidden \[2, 3, H\] for labels \[2, 3\], got \[4, 3, 5\]"),
    (lambda: stats(H, Y, Hidden(X[:2], W)), r"ref: expected hidden \[4, 3, H\]"),
    (lambda: stats(H, Y, divergence="js"), "divergence: 'js' needs ref as fl.Hidden or logits, got None"),
    (lambda: stats(H, Y, fl.LogProbs(X[..., 0]), divergence="js"), "got fl.LogProbs"),
    (lambda: stats(H, Y, fl.LogProbs(X)), r"ref: expected fl.LogProbs \[4, 3\]"),
    (lambda: stats(H, Y, workspace=8), r"workspace: expected at least \d+ bytes, for 11 logits of one row, got 8"),
    (lambda: stats(ASKS, Y, plan="frozen_head", workspace=8), r"workspace: expected at least \d+ bytes.*got 8$"),
    (lambda: dpo(ASKS, Y, plan="row_blocks", workspace=8),
     r"plan: 'row_blocks' is not possible here: .*unit takes \d+ bytes of 8"),
    (lambda: stats(H, Y, workspace=1e9), "workspace: expected a number of bytes >= 1, got 1000000000.0"),
    (lambda: stats(H, Y, workspace="1"), "workspace: expected a number of bytes >= 1, got '1'"),
    (lambda: stats(H, Y, workspace=0), "workspace: expected a number of bytes >= 1, got 0"),
    (lambda: stats(H, Y, workspace=True), "workspace: expected a number of bytes >= 1, got True"),
    (lambda: dpo(H, Y, workspace=-5), "workspace: expected a number of bytes >= 1, got -5"),
    (lambda: stats(H, Y, plan="fast"), "plan: expected one of auto, .*vocab_chunks.*, got 'fast'"),
    (lambda: dpo(H, Y, plan="fast"), "plan: expected one of auto, .*vocab_chunks.*, got 'fast'"),
    (lambda: stats(ASKS, Y, plan="row_blocks"), "plan: 'row_blocks' is not possible here: it is for losses that are reduced"),
    (lambda: stats(ALL, Y, plan="frozen_head"), "plan: 'frozen_head' is not possible here: .*head.*no gradient"),
    (lambda: stats(ASKS, Y, plan="on_chip"), "plan: 'on_chip' is not possible here: it is a Triton kernel"),
    (lambda: stats(ASKS, Y, plan="keep_logits", workspace=50), "plan: 'keep_logits' is not possible here: .* bytes of 50"),
    (lambda: stats(X, Y, plan="vocab_chunks"), "plan, workspace, static_shapes: are for fl.Hidden sources, got logits"),
    (lambda: stats(X, Y, workspace=9), "plan, workspace, static_shapes: are for fl.Hidden"),
    (lambda: dpo(X, Y, static_shapes=True), "plan, workspace, static_shapes: are for fl.Hidden"),
    (lambda: stats(ASKS, Y, inplace_backward=True), "inplace_backward: is for logits on both sides"),
    (lambda: dpo(ASKS, Y, inplace_backward=True), "inplace_backward: is for logits on both sides"),
    (lambda: stats(torch.zeros(4, 3, 11), Y, H, inplace_backward=True), "inplace_backward: is for logits on both sides"),
    (lambda: stats(H, Y - 1), r"labels: expected ids in \[0, 11\)"),
    (lambda: stats(H, Y + 11, plan="vocab_chunks"), r"labels: expected ids in \[0, 11\).*got 11"),
    (lambda: dpo(ASKS, Y + 11, plan="row_blocks"), r"labels: expected ids in \[0, 11\).*got 11"),
    (lambda: stats(H, Y.to("meta")), "policy: expected hidden on meta as the labels are, got cpu"),
    (lambda: stats(Hidden(X, W.to("meta")), Y), "policy: expected weight on cpu as hidden is, got meta"),
    (lambda: stats(H, Y, Hidden(X, W, W[:, 0].to("meta"))), "ref: expected bias on cpu as hidden is, got meta"),
    (lambda: stats(Hidden(X, W, lora=(W[:2], W[:, :2].to("meta"))), Y), "policy: expected lora b on cpu"),
    (lambda: stats(H, Y, Hidden(X.to("meta"), W.to("meta"))), "ref: expected hidden on cpu as the labels are, got meta"),
    (lambda: stats(H.hidden, Y, H, divergence="js"), "ref: expected the policy's vocabulary of 5, got 11"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    call, words = BAD[case]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words):
        call()


@pytest.mark.parametrize("value", ["", "256MiB", "-1", "0", "1e9"])
def test_a_workspace_variable_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", value)
    with pytest.raises(ValueError, match="FUSED_LOSSES_WORKSPACE: expected a number of bytes >= 1, got"):
        fl.token_stats(H, Y, shift=False)


def test_the_workspace_variable_counts_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", "8")
    with pytest.raises(ValueError, match="workspace: expected at least .* got 8"):
        fl.token_stats(H, Y, shift=False)
    fl.token_stats(H, Y, workspace=1 << 20, shift=False)
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", str(1 << 20))
    fl.token_stats(H, Y, shift=False)


@cases(["auto", "frozen_head", "keep_logits", "vocab_chunks"], ["vocab_chunks"])
def test_the_least_workspace_is_enough(backend, device, plan):
    """What the refusal asks for does."""
    leaves = both_sides((3,), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    policy, ref = two_sources(leaves)
    y = labels_for((3,), 41, device)
    run = lambda bytes: fl.token_stats(policy, y, ref, divergence="js", plan=plan, workspace=bytes, shift=False)  # noqa: E731
    fewest = least_workspace(run)
    run(fewest).logps.sum().backward()
    assert least_workspace(lambda _: run(fewest - 1)) == fewest


@pytest.mark.parametrize("plan", ["vocab_chunks", "keep_logits"])
def test_labels_out_of_range_on_triton(device, monkeypatch, plan):
    """NaN for their rows, and no other row is touched."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    x, weight = torch.randn(3, 5, device=device).requires_grad_(), torch.randn(11, 5, device=device)
    for bad in (11, -7):
        stats = fl.token_stats(fl.Hidden(x, weight), torch.tensor([1, bad, 2], device=device), plan=plan, shift=False)
        assert stats.logps.isnan().tolist() == [False, True, False]
        good = fl.token_stats(fl.Hidden(x, weight), torch.tensor([1, 0, 2], device=device), plan=plan, shift=False)
        assert torch.equal(stats.logps[::2], good.logps[::2])
        (g,) = torch.autograd.grad(stats.logps[::2].sum(), x)
        torch.testing.assert_close(g[::2], torch.autograd.grad(good.logps[::2].sum(), x)[0][::2])


def test_dtensor_is_refused_in_words():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("no process group to be had")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(W, init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"weight: got a DTensor; gather it first \(.full_tensor\(\)\)"):
            fl.Hidden(X, weight)
    finally:
        dist.destroy_process_group()


# ---- as torch sees the operators ---------------------------------------------------------------------------------------


def stats_arguments(leaves, y, plan, backend, divergence="forward_kl;js", workspace=1 << 20, static=False):
    """Of fused_losses::hidden_stats, ten leaves."""
    policy, ref = Inputs(*leaves[:5], 0.7), Inputs(*leaves[5:], 0.7)
    wanted = Wanted(InputFlags.required(policy), InputFlags.required(ref))
    spec = StatsSpec(divergences.parse(divergence.split(";")), True, True, False, -100, 41)
    return hidden_ops.HiddenStatsArgs(
        y, policy, ref, hidden_ops.Options(spec, backend, plan, workspace, static), wanted
    )


LAYOUTS = [(p, layout, static) for p in PLANS for layout in ("contiguous", "transposed") for static in (False, True)]


@pytest.mark.slow
@cases(
    [c for c in LAYOUTS if c[0] not in ("auto", "on_chip")],
    [c for c in LAYOUTS if c == ("on_chip", "contiguous", False)], name="what",
)  # fmt: skip
def test_opcheck_hidden_stats(backend, device, what):
    plan, layout, static = what
    leaves = both_sides((2, 3), device)
    if layout == "transposed":  # hidden states [time, batch], weights [H, V]
        turn = lambda x: x.detach().mT.contiguous().mT.requires_grad_()  # noqa: E731
        leaves[0] = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        leaves[1], leaves[3], leaves[4] = turn(leaves[1]), turn(leaves[3]), turn(leaves[4])
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    # what "keep_logits" keeps is not written for rows that do not count, and opcheck compares all of it
    y = labels_for((2, 3), 41, device, masked=plan != "keep_logits" or static)
    args = stats_arguments(leaves, y, plan, backend, static=static)
    opcheck(OPS.hidden_stats.default, tuple(hidden_ops.ARGS.pack(args)))
    detached = [x if x is None else x.detach() for x in leaves]
    call = stats_arguments(detached, y, plan, backend, static=static)._replace(wanted=args.wanted)
    found = hidden_ops.RESULT.unpack(OPS.hidden_stats(*hidden_ops.ARGS.pack(call)))
    g = torch.randn(6, device=device)
    grads = Grads(logps=g, entropy=g, divergence=torch.randn(2, 6, device=device))
    back = hidden_ops.HiddenStatsBackwardArgs(grads, found.stats.logps, found.stats.saved, found.keep, call)
    back = tuple(hidden_ops.BACKWARD_ARGS.pack(back))
    opcheck(OPS.hidden_stats_backward.default, back, test_utils=("test_schema", "test_faketensor"))


def training_step(x, weight, a, b, ref_x, ref_weight, y, plan):
    """A loss, a divergence as a penalty, an entropy bonus."""
    policy, ref = fl.Hidden(x, weight, lora=(a, b, 0.5)), fl.Hidden(ref_x, ref_weight)
    how = {"plan": plan, "workspace": 1 << 20}
    out = fl.dpo_loss(policy, y, ref, divergence="js", shift=True, **how)
    sums = {"entropy": True, "collision": True}
    stats = fl.token_stats(policy, y, ref, divergence=["forward_kl", "js"], shift=True, **sums, **how)
    penalty = sum(d.mean() for d in stats.divergence.values()) - (stats.entropy * stats.collision.exp()).mean()
    return out.loss + penalty, out.metrics["rewards/margins"]


@pytest.mark.slow
@cases(
    [("frozen_head", False), ("keep_logits", False), ("vocab_chunks", False), ("vocab_chunks", True), ("auto", False),
    ("auto", True)],
    [("auto", False)], name="what",  # in operators that the compiler does not look into
)  # fmt: skip
def test_compile_without_graph_breaks(backend, device, what):
    """ "auto" takes row blocks in eager mode, and what torch.compile sees through when it compiles."""
    plan, dynamic = what
    torch._dynamo.reset()
    compiled = torch.compile(training_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 4) if dynamic else (3,):
        leaves = both_sides((4, length), device, rank=2)
        leaves[0] = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        leaves[1] = leaves[1].detach().T.contiguous().T.requires_grad_()
        if plan == "frozen_head":
            leaves = frozen_head(leaves)
        x, weight, _, a, b, ref_x, ref_weight, *_ = leaves
        y = labels_for((4, length), 41, device)
        eager, margin = training_step(x, weight, a, b, ref_x, ref_weight, y, plan)
        loss, metric = compiled(x, weight, a, b, ref_x, ref_weight, y, plan)
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(metric, margin)
        asked = asking([x, weight, a, b])
        for g, t in zip(torch.autograd.grad(loss, asked), torch.autograd.grad(eager, asked), strict=True):
            torch.testing.assert_close(g, t)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@cases(PAIR_PLANS, ["row_blocks"])
def test_checkpointing(backend, device, plan, reentrant):
    leaves = both_sides((4, 2), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4, 2), 41, device)

    def call(x):
        policy, ref = two_sources([x * 1.0, *leaves[1:]])
        return fl.dpo_loss(policy, y, ref, plan=plan, shift=False).loss

    expected = gradients_of(call(leaves[0]), leaves)
    checkpoint(call, leaves[0], use_reentrant=reentrant).backward()
    for x, t in zip(asking(leaves), expected, strict=True):
        torch.testing.assert_close(x.grad, t)


@cases(PAIR_PLANS, ["row_blocks"])
def test_second_derivative_is_refused_in_words(backend, device, plan):
    """Also where the gradient came with the forward, and depends on what follows the loss."""
    leaves = both_sides((4, 2), device)
    leaves = frozen_head(leaves) if plan == "frozen_head" else leaves
    y = labels_for((4, 2), 41, device)
    policy, ref = two_sources(leaves)
    if plan != "row_blocks":
        stats = fl.token_stats(policy, y, ref, divergence="js", plan=plan, shift=False)
        (g,) = torch.autograd.grad(stats.divergence["js"].sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once; use fused_losses.reference"):
            torch.autograd.grad(g.sum(), leaves[0])
    for after in (lambda loss: loss, lambda loss: loss**2):
        loss = after(fl.dpo_loss(policy, y, ref, plan=plan, shift=False).loss)
        (g,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once; use fused_losses.reference"):
            torch.autograd.grad(g.square().sum(), leaves[0])
