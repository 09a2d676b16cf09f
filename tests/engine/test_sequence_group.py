"""Sequences split over ranks along time (sequence, context parallel) give what one process gives: every loss, padded and
packed, slices of any length, on two and four ranks (gloo); beside a split vocabulary too."""

import pytest
import torch
import torch.distributed as dist
from family_batches import CASES, Batch, V, sources_of
from helpers import seeded
from ranks import on_ranks

import fused_losses as fl
from fused_losses.losses import FAMILY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
SPLITS = [(0.5, 0.5), (0.0, 1.0), (0.25, 0.25, 0.25, 0.25), (0.1, 0.6, 0.0, 0.3)]  # shares of the time axis


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


def own(rank, split, total):
    ends = [round(total * sum(split[:i])) for i in range(len(split) + 1)]
    return slice(ends[rank], ends[rank + 1])


def part(x, rank, split, packed):
    """This rank's of a tensor [S, T, ...], or [total, ...]."""
    return x[own(rank, split, len(x))] if packed else x[:, own(rank, split, x.shape[1])]


def parted(batch, rank, split, group):
    packed = "cu_seqlens" in batch.options
    for name in ("x", "ref_x", "y"):
        setattr(batch, name, part(getattr(batch, name), rank, split, packed))
    for name, kind in batch.entry.inputs.items():
        if "per token" in kind:
            batch.extra[name] = part(batch.extra[name], rank, split, packed)
    batch.options["sequence_group"] = group
    return batch


def same(mine, exact, what):
    torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m: f"{what}: {m}")


def check_family(rank, group, split, odd):
    for i, (name, variant) in enumerate(CASES):
        packed = (i % 2 > 0) == odd and FAMILY[name].batch != "tokens"
        whole = Batch(name, variant, packed)
        batch = parted(Batch(name, variant, packed), rank, split, group)
        kinds = sources_of(whole.entry)
        kind, ref = (
            kinds[i % len(kinds)] if i % 4 == 1 else ("hidden", None if whole.entry.ref == "unused" else "hidden")
        )
        how = {"entropy": True} if kind != "log-probs" and i % 3 else {}
        truth, exact = whole.call(fl, torch.float64, kind, ref, how)
        out, found = batch.call(fl, torch.float64, kind, ref, how)
        words = f"{name} {variant}, {kind}, packed {packed}"
        same(out.loss, truth.loss, words)
        assert out.metrics.keys() == truth.metrics.keys(), words
        for key, value in truth.metrics.items():
            same(out.metrics[key], value, f"{words}, {key}")
        assert out.stats.mask.shape == batch.y.shape
        same(found[0], part(exact[0], rank, split, packed), f"{words}, states")
        if kind == "hidden":
            dist.all_reduce(found[1], group=group)
            same(found[1], exact[1], f"{words}, weight")


def check_units(rank, group, split):
    """reduction="none": losses of pairs and sequences are the whole's, those of tokens this rank's; and each can have a
    gradient of its own."""
    for name, packed in ((n, p) for n in FAMILY for p in (False, True)):
        variant = next(iter(FAMILY[name].variants))
        packed = packed and FAMILY[name].batch != "tokens"
        ref, how = None if FAMILY[name].ref == "unused" else "hidden", {"reduction": "none"}
        truth, exact = Batch(name, variant, packed).call(fl, torch.float64, "hidden", ref, how)
        out, found = parted(Batch(name, variant, packed), rank, split, group).call(
            fl, torch.float64, "hidden", ref, how
        )
        tokens = FAMILY[name].batch == "tokens"
        same(out.loss, part(truth.loss, rank, split, packed) if tokens else truth.loss, name)
        same(found[0], part(exact[0], rank, split, packed), name)


def check_both(rank, group):
    """A 2 x 2 mesh: the time axis over one dimension, the vocabulary over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("time", "vocab"))
    at, rows = mesh.get_local_rank("time"), own(mesh.get_local_rank("vocab"), (0.3, 0.7), V)
    for i, (name, variant) in enumerate(CASES):
        if i % 3 or name == "topk_distillation_loss":
            continue
        packed, ref = i % 2 > 0 and FAMILY[name].batch != "tokens", None if FAMILY[name].ref == "unused" else "hidden"
        truth, exact = Batch(name, variant, packed).call(fl, torch.float64, "hidden", ref)
        batch = parted(Batch(name, variant, packed), at, (0.3, 0.7), mesh.get_group("time"))
        batch.weight, batch.ref_weight = batch.weight[rows], batch.ref_weight[rows]
        batch.head = {"process_group": mesh.get_group("vocab")}
        out, found = batch.call(fl, torch.float64, "hidden", ref)
        same(out.loss, truth.loss, name)
        same(found[0], part(exact[0], at, (0.3, 0.7), packed), name)
        dist.all_reduce(found[1], group=mesh.get_group("time"))
        same(found[1], exact[1][rows], name)


def tensors():
    seeded(3)
    x, w = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    y = torch.randint(0, 11, (4, 6))
    y[:, 0], y[1, 3:] = -100, -100
    return x, w, y, torch.randn(4, 6, dtype=torch.float64) - 3


def check_references(rank, group):
    """Saved log-probs per token are a rank's own, per sequence all; where a rank has as many tokens as there are sequences,
    the other knows which they are. And static shapes, where no sizes are exchanged."""
    x, w, y, q = tensors()
    cu = torch.tensor([0, 6, 12, 18, 24])
    q = q.masked_fill(y == -100, 0)
    for cut in (4, 9, 24):
        mine = slice(0, cut) if rank == 0 else slice(cut, 24)
        flat = fl.Hidden(x.flatten(0, 1)[mine].requires_grad_(), w)
        for ref, given in ((q.sum(1), q.sum(1)), (q.flatten(), q.flatten()[mine])):
            exact = fl.dpo_loss(
                fl.Hidden(x.flatten(0, 1), w), y.flatten(), fl.LogProbs(ref), cu_seqlens=cu, shift=False
            )
            options = {"cu_seqlens": cu, "sequence_group": group}
            found = fl.dpo_loss(flat, y.flatten()[mine], fl.LogProbs(given), **options, shift=False)
            same(found.loss, exact.loss, f"cut {cut}, {list(given.shape)}")
    whole = fl.dpo_loss(fl.Hidden(x, w), y, fl.LogProbs(q.sum(1)), shift=False)
    mine = slice(3 * rank, 3 * rank + 3)
    parts = fl.Hidden(x[:, mine].requires_grad_(), w), y[:, mine], fl.LogProbs(q.sum(1))
    found = fl.dpo_loss(*parts, sequence_group=group, static_shapes=True, shift=False)
    same(found.loss, whole.loss, "static")
    compiled = torch.compile(fl.dpo_loss, fullgraph=True, backend="aot_eager")(
        *parts, sequence_group=group, static_shapes=True, shift=False
    )
    same(compiled.loss, whole.loss, "compiled")
    grads = [torch.autograd.grad(out.loss, parts[0].hidden) for out in (compiled, found)]
    same(*(g for (g,) in grads), "compiled")
    z0 = fl.kto_baseline(*parts, sequence_group=group, shift=False)
    same(z0, fl.kto_baseline(fl.Hidden(x, w), y, fl.LogProbs(q.sum(1)), shift=False), "baseline")


def check_thoughts(rank, group):
    """What is whole on every rank has the whole gradient on every rank."""
    x, w, y, _ = tensors()
    states = [torch.randn(4, *n, 7, dtype=torch.float64, requires_grad=True) for n in ((), (2,), (3,), ())]
    mine = slice(0, 2) if rank == 0 else slice(2, 6)
    whole = fl.lta_thinker_loss(fl.Hidden(x, w), y, *states, shift=False).loss
    found = fl.lta_thinker_loss(fl.Hidden(x[:, mine], w), y[:, mine], *states, sequence_group=group, shift=False).loss
    for g, t in zip(*(torch.autograd.grad(loss, states[:3]) for loss in (found, whole)), strict=True):
        same(g, t, "states")


def refusals(rank, group):
    x, w, y, q = tensors()
    p, mine = fl.Hidden(x[:, :3], w), y[:, :3]
    flat = fl.Hidden(x.flatten(0, 1), w), y.flatten()
    cu = torch.tensor([0, 10, 20, 30, 48])
    for call, words in (
        (lambda: fl.dpo_loss(p, mine, None, sequence_group=group, shift=True), "shift: beside sequence_group"),
        (lambda: fl.simpo_loss(p, mine, sequence_group=group, shift=True), "shift: beside sequence_group"),
        (lambda: fl.grpo_loss(p, mine, q[:, 0], sequence_group=group, shift=True), "shift: beside sequence_group"),
        (
            lambda: fl.dpo_loss(p, mine, None, sequence_group=group, plan="row_blocks", shift=False),
            "plan: 'row_blocks' is not possible here",
        ),
        (
            lambda: fl.dpo_loss(p, mine, None, sequence_group="world", shift=False),
            "sequence_group: expected a torch.*got str",
        ),
        (
            lambda: fl.kto_loss(p, mine, None, y[:, 1] > 3, sequence_group=0, shift=False),
            "sequence_group: expected a torch.*got int",
        ),
        (
            lambda: fl.cross_entropy_loss(fl.Hidden(x[0, 0], w), y[0, 1], sequence_group=group, shift=False),
            "labels: .* a time axis",
        ),
        (
            lambda: fl.dpo_loss(
                fl.Hidden(x[: 4 - 2 * rank], w), y[: 4 - 2 * rank], None, sequence_group=group, shift=False
            ),
            r"labels: expected as many sequences on all ranks of sequence_group, got \[4, 2\]",
        ),
        (
            lambda: fl.dpo_loss(*flat, None, cu_seqlens=cu - (cu == 48).long(), sequence_group=group, shift=False),
            "rising from 0 to 48, the",
        ),
        (
            lambda: fl.dpo_loss(*flat, None, cu_seqlens=cu.flip(0), sequence_group=group, shift=False),
            "cu_seqlens: expected offsets rising",
        ),
        (
            lambda: fl.dpo_loss(
                *flat, fl.LogProbs(q[:, rank]), cu_seqlens=cu, ld_alpha=0.5, sequence_group=group, shift=False
            ),
            "ld_alpha: needs the reference's log-probs per token",
        ),
        (
            lambda: fl.dpo_loss(*flat, fl.LogProbs(q[: 4 - rank, 0]), cu_seqlens=cu, sequence_group=group, shift=False),
            rf"ref: expected fl.LogProbs \[4\] on all ranks of sequence_group, or per token on all, got \[{4 - rank}\]",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_loss(split):
    on_ranks(len(split), check_family, split, SPLITS.index(split) % 2 > 0)


def test_losses_of_units():
    on_ranks(2, check_units, (0.3, 0.7))


def test_beside_a_split_vocabulary():
    on_ranks(4, check_both)


def test_saved_references():
    on_ranks(2, check_references)


def test_what_is_whole():
    on_ranks(2, check_thoughts)


def test_refusals():
    on_ranks(2, refusals)


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_reads_it(name):
    batch = Batch(name, next(iter(FAMILY[name].variants)))
    with pytest.raises(ValueError, match="sequence_group: torch.distributed is not initialised"):
        batch.call(fl, torch.float32, "hidden", "hidden", {"sequence_group": object()})
