"""A vocabulary split over ranks gives what one process gives: every loss, every part of a head, even and uneven slices, two
and four ranks (gloo)."""

import os

import pytest
import torch
import torch.distributed as dist
from family_batches import CASES as FAMILY_CASES
from family_batches import Batch, V
from helpers import relative, seeded
from ranks import on_ranks
from tiny_models import H as TINY_H
from tiny_models import Tiny
from tiny_models import V as TINY_V

import fused_losses as fl
from fused_losses.losses import FAMILY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
VOCAB, H, R = 67, 8, 3
SPLITS = [(0.45, 0.55), (0.95, 0.05), (0.25, 0.25, 0.25, 0.25), (0.02, 0.6, 0.08, 0.3)]  # shares of the vocabulary


def own(rank, split, vocab):
    """This rank's rows of a head of so many tokens."""
    ends = [round(vocab * sum(split[:i])) for i in range(len(split) + 1)]
    return slice(ends[rank], ends[rank + 1])


def tensors(dtype=torch.float64):
    seeded(5)
    new = lambda *shape: torch.randn(shape, dtype=dtype)  # noqa: E731
    x, w, bias, a, b = new(4, 6, H), 2 * new(VOCAB, H), new(VOCAB), new(R, H), new(VOCAB, R)
    ref_x, ref_w = x + 0.3 * new(4, 6, H), w + 0.3 * new(VOCAB, H)
    labels = torch.randint(0, VOCAB, (4, 6))
    labels[:, 0], labels[1, 3:] = -100, -100
    return [x, w, bias, a, b], [ref_x, ref_w], labels


def sources(policy, ref, rows=slice(None), **shard):
    x, w, bias, a, b = policy
    head = {"softcap": 7.0, "temperature": 0.8}
    p = fl.Hidden(x, w[rows], bias[rows], lora=fl.Lora(a, b[rows], 0.5), **head, **shard)
    return p, fl.Hidden(ref[0], ref[1][rows], **head, **shard)


def kept(labels):
    """Seven ids of each token, all over the vocabulary, the label among them."""
    return (labels.clamp(min=0).unsqueeze(-1) + 9 * torch.arange(7)) % VOCAB


def kept_loss(policy, labels):
    stats = fl.token_stats(policy, labels, support=fl.Support(kept(labels)), entropy=True, shift=False)
    return (stats.logps - 0.3 * stats.entropy).sum()


def topk_loss(policy, labels):
    ids = kept(labels)
    teacher = torch.linspace(-1, -4, 7, dtype=torch.float64).expand(*ids.shape)
    return fl.topk_distillation_loss(policy, labels, teacher, ids, hard=0.3, shift=False).loss


# What the family below does not: softcap, temperature, bias and LoRA on every one, gradients of the reference, other options
CASES = {
    "dpo": lambda p, y, q: fl.dpo_loss(p, y, q, shift=False).loss,
    "wpo": lambda p, y, q: fl.dpo_loss(p, y, q, use_weighting=True, shift=False).loss,
    "js link": lambda p, y, q: fl.dpo_loss(p, y, q, divergence="js(beta=0.5)", plan="keep_logits", shift=False).loss,
    "tdpo": lambda p, y, q: fl.tdpo_loss(p, y, q, shift=False).loss,
    "jsd": lambda p, y, q: fl.distillation_loss(p, y, q, shift=False).loss,
    "alpha": lambda p, y, q: fl.distillation_loss(p, y, q, divergence="alpha(a=0.3)", hard=0.5, shift=False).loss,
    "ce": lambda p, y, q: fl.cross_entropy_loss(p, y, z_loss=0.1, label_smoothing=0.2, shift=False).loss,
    "entropy": lambda p, y, q: fl.token_stats(p, y, entropy=True, shift=True, workspace=1 << 14).entropy.sum(),
    "support": lambda p, y, q: kept_loss(p, y),
    "logits at": lambda p, y, q: fl.logits_at(p, kept(y)).square().mean(),
    "top-k": lambda p, y, q: topk_loss(p, y),
}


def answer(name, policy, ref, labels, **options):
    leaves = [t.detach().clone().requires_grad_() for t in policy]
    others = [t.detach().clone().requires_grad_() for t in ref] if name in ("jsd", "tdpo") else ref
    seeded(9)
    rows = options.pop("rows", slice(None))
    loss = CASES[name](*(lambda p, q: (p, labels, q))(*sources(leaves, others, rows, **options)))
    wanted = leaves + (others if others is not ref else [])
    return loss.detach(), torch.autograd.grad(loss, wanted)


def check_family(rank, group, split):
    """Every variant of every loss, padded and packed in turn."""
    rows = own(rank, split, V)
    for i, (name, variant) in enumerate(FAMILY_CASES):
        whole, batch = (Batch(name, variant, packed=i % 2 > 0 and FAMILY[name].batch != "tokens") for _ in range(2))
        ref = None if batch.entry.ref == "unused" else "hidden"
        batch.weight, batch.ref_weight = batch.weight[rows], batch.ref_weight[rows]
        batch.head = {"process_group": group} | ({"shard": (rows.start, V)} if i % 3 else {})
        truth, (dx, dw) = whole.call(fl, torch.float64, "hidden", ref)
        out, found = batch.call(fl, torch.float64, "hidden", ref)
        for what, mine, exact in (("loss", out.loss, truth.loss), ("dx", found[0], dx), ("dw", found[1], dw[rows])):
            words = f"{name} {variant}, {what}"
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11, msg=lambda m, w=words: f"{w}: {m}")
        assert out.metrics.keys() == truth.metrics.keys()
        for key, value in truth.metrics.items():
            torch.testing.assert_close(out.metrics[key], value, rtol=1e-9, atol=1e-11, equal_nan=True)


def check(rank, group, split):
    policy, ref, labels = tensors()
    rows = own(rank, split, VOCAB)
    first = rows.start
    for i, name in enumerate(CASES):
        loss, gradients = answer(name, policy, ref, labels)
        told = {"shard": (first, VOCAB)} if i % 2 else {}
        split, found = answer(name, policy, ref, labels, rows=rows, process_group=group, **told)
        torch.testing.assert_close(split, loss, rtol=1e-10, atol=1e-12, msg=f"{name}: loss")
        here = [False, True, True, False, True, False, True]  # those of which a rank has its rows alone
        for j, (g, t) in enumerate(zip(found, gradients, strict=True)):
            torch.testing.assert_close(
                g[rows] if here[j] else g,
                t[rows] if here[j] else t,
                rtol=1e-9,
                atol=1e-11,
                msg=lambda m, name=name, j=j: f"{name}, gradient {j}: {m}",
            )
    z, w = policy[0] @ policy[1].T, ref[0] @ ref[1].T
    whole = fl.token_stats(z, labels, w, divergence=["forward_kl", "js"], entropy=True, collision=True, shift=False)
    mine = [fl.Logits(t[..., rows].clone().requires_grad_(), process_group=group) for t in (z, w)]
    split = fl.token_stats(
        mine[0], labels, mine[1], divergence=["forward_kl", "js"], entropy=True, collision=True, shift=False
    )
    for key in ("logps", "ref_logps", "entropy", "collision", "lse"):
        torch.testing.assert_close(getattr(split, key), getattr(whole, key), rtol=1e-10, atol=1e-12)
    assert torch.equal(split.correct, whole.correct)
    for key, value in whole.divergence.items():
        torch.testing.assert_close(split.divergence[key], value, rtol=1e-9, atol=1e-12)
    for loss in (kept_loss, topk_loss):
        leaf = z.clone().requires_grad_()
        exact, part = loss(leaf, labels), loss(mine[0], labels)
        torch.testing.assert_close(part, exact, rtol=1e-10, atol=1e-12)
        (g,), (t,) = torch.autograd.grad(part, mine[0].logits), torch.autograd.grad(exact, leaf)
        torch.testing.assert_close(g, t[..., rows], rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=f"ids: expected tokens in .0, {VOCAB}., got {VOCAB}"):
        fl.logits_at(mine[0], torch.full((4, 6, 1), VOCAB))
    for sides in ((mine[0], w), (z, mine[1])):  # one of the two is split: each is gone through on its own
        torch.testing.assert_close(
            fl.dpo_loss(sides[0], labels, sides[1], shift=False).loss,
            fl.dpo_loss(z, labels, w, shift=False).loss,
            rtol=1e-10,
            atol=1e-12,
        )
    (dz,) = torch.autograd.grad(split.divergence["js"].sum(), mine[0].logits)
    full = z.clone().requires_grad_()
    (dz_whole,) = torch.autograd.grad(
        fl.token_stats(full, labels, w, divergence="js", shift=False).divergence["js"].sum(), full
    )
    torch.testing.assert_close(dz, dz_whole[..., rows], rtol=1e-9, atol=1e-12)


def check_dtensor(rank, group):
    """A head that tensor parallelism has split, with the gradient where it belongs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,))
    policy, _, labels = tensors()
    x, w, bias = (t.requires_grad_() for t in policy[:3])
    loss = fl.dpo_loss(fl.Hidden(x, w, bias), labels, None, shift=False).loss
    whole = torch.autograd.grad(loss, (x, w, bias))
    parts = [distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in (w, bias)]
    split = fl.dpo_loss(fl.Hidden(x, *parts, process_group=mesh.get_group()), labels, None, shift=False).loss
    torch.testing.assert_close(split, loss, rtol=1e-10, atol=1e-12)
    dx, dw, dbias = torch.autograd.grad(split, (x, *parts))
    for found, expected in ((dx, whole[0]), (dw.full_tensor(), whole[1]), (dbias.full_tensor(), whole[2])):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    copies = distribute_tensor(w.detach(), mesh, [Replicate()])
    with pytest.raises(ValueError, match="sharded on dim 0 alone"):
        fl.Hidden(x, copies, process_group=mesh.get_group())


def take(batch, rows):
    """Some sequences of a padded batch."""
    for name in ("x", "ref_x", "y"):
        setattr(batch, name, getattr(batch, name)[rows])
    batch.extra = {n: t[rows] for n, t in batch.extra.items()}


def check_data(rank, group):
    """Data parallel beside it, 2 x 2: each pair of ranks has its sequences, and a head that is split within the pair. An
    engine averages gradients over the data dimension, of a loss that was multiplied by that dimension's size."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocab"))
    half, rows = mesh.get_local_rank("data"), own(mesh.get_local_rank("vocab"), (0.3, 0.7), V)
    pairs, single = ([0, 1, 3, 4], [2, 5]), ([0, 1, 2], [3])
    for name, variant, halves in (
        ("preference_loss", "MPO", pairs),
        ("cross_entropy_loss", "both", single),
        ("distillation_loss", "with labels", single),
    ):
        whole, batch = Batch(name, variant), Batch(name, variant)
        ref = None if batch.entry.ref == "unused" else "hidden"
        truth, (dx, dw) = whole.call(fl, torch.float64, "hidden", ref)
        take(batch, halves[half])
        batch.weight, batch.ref_weight = batch.weight[rows], batch.ref_weight[rows]
        batch.head = {"process_group": mesh.get_group("vocab")}
        batch.options["num_items"] = 3 if name == "preference_loss" else int((whole.y != -100).sum())
        if name == "preference_loss":
            batch.options["num_nll_tokens"] = int((whole.y[:3] != -100).sum())
        out, found = batch.call(fl, torch.float64, "hidden", ref)
        torch.testing.assert_close(found[0], dx[halves[half]], rtol=1e-9, atol=1e-11)
        loss, averaged = 2 * out.loss.detach(), 2 * found[1]
        for mine, exact in ((loss, truth.loss), (averaged, dw[rows])):
            dist.all_reduce(mine, group=mesh.get_group("data"))
            torch.testing.assert_close(mine / 2, exact, rtol=1e-9, atol=1e-11)


def check_modules(rank, group):
    """A FusedHead of a rank's rows: of a linear layer that holds them alone, and of a model whose head is a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    policy, ref, labels = tensors()
    x, w, bias = policy[:3]
    exact = torch.autograd.grad(fl.dpo_loss(fl.Hidden(x, w.requires_grad_(), bias), labels, None, shift=False).loss, w)[
        0
    ]
    rows = own(rank, SPLITS[3], VOCAB)
    linear = torch.nn.Linear(H, rows.stop - rows.start, dtype=torch.float64)
    linear.weight.data, linear.bias.data = w.detach()[rows], bias[rows]
    for shard in (None, (rows.start, VOCAB)):
        fl.FusedHead(linear, process_group=group, shard=shard)(
            x, labels, None, loss=fl.dpo_loss, shift=False
        ).loss.backward()
        torch.testing.assert_close(linear.weight.grad, exact[rows], rtol=1e-9, atol=1e-11)
        linear.zero_grad()

    seeded(1)
    model = Tiny(torch.nn.Linear(TINY_H, TINY_V), after=lambda z: 20 * torch.tanh(z / 20)).double()
    ids = torch.randint(3, TINY_V, (2, 5))
    truth = model(ids).logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    mesh = init_device_mesh("cpu", (4,))
    for name in ("weight", "bias"):
        p = distribute_tensor(getattr(model.lm_head, name).detach(), mesh, [Shard(0)])
        setattr(model.lm_head, name, torch.nn.Parameter(p))
    head = fl.find_head(model, process_group=group)
    assert head.weight is model.lm_head.weight and head.options["softcap"] == 20
    found = fl.token_stats(head.source(fl.backbone(model)(ids).last_hidden_state), ids, shift=False).logps
    torch.testing.assert_close(found, truth)
    found.sum().backward()
    assert model.lm_head.weight.grad.placements == (Shard(0),)
    with pytest.raises(TypeError, match="its weight is a DTensor; make the FusedHead before"):
        fl.find_head(model)
    model.after = lambda z: z[..., :90]
    with pytest.raises(NotImplementedError, match="90 rows of the head are tokens"):
        fl.find_head(model, process_group=group)
    pair = dist.new_group([0, 1])
    if rank < 2:
        with pytest.raises(ValueError, match=r"over the ranks of process_group, \[0, 1\], got one over \[0, 1, 2, 3\]"):
            fl.FusedHead(model.lm_head, process_group=pair).source(x)


def check_rounding(rank, group, split):
    """Gradients of what all ranks hold are rounded once, after the sum: parts are far larger than it and cancel."""
    policy, _, labels = tensors()
    rows = own(rank, split, VOCAB)
    for dtype in (torch.bfloat16, torch.float16):
        half = [t.to(dtype) for t in policy]
        truth = answer("dpo", [t.double() for t in half], tensors()[1], labels)[1]
        leaves = [t.detach().clone().requires_grad_() for t in half]
        ref = [t.to(dtype) for t in tensors()[1]]
        errors = []
        for at, options in ((slice(None), {}), (rows, {"process_group": group})):
            p, q = sources(leaves, ref, at, **options)
            found = torch.autograd.grad(fl.dpo_loss(p, labels, q, shift=False).loss, [leaves[0], leaves[3]])
            assert all(g.dtype == dtype for g in found)
            errors.append([relative(g, t) for g, t in zip(found, (truth[0], truth[3]), strict=True)])
        for alone, shared in zip(*errors, strict=True):
            assert shared <= 1.1 * alone, (dtype, alone, shared)


def check_triton(rank, group, split):
    """In Triton's interpreter: states merge, labels of other ranks are legal, slices have their place."""
    policy, ref, labels = tensors(torch.float32)
    rows = own(rank, split, VOCAB)
    for name in ("dpo", "jsd", "entropy"):
        loss, gradients = answer(name, policy, ref, labels)
        split, found = answer(name, policy, ref, labels, rows=rows, process_group=group)
        torch.testing.assert_close(split, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[0], gradients[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[1][rows], gradients[1][rows], rtol=1e-4, atol=1e-6)


def check_topk(rank, group, split, dtype, *several):
    """Ids of the whole vocabulary, ties between ranks, suppressed tokens beside ranks that have fewer tokens than k."""
    seeded(5)
    whole = lambda *shape: torch.randint(-2, 3, shape).to(dtype)  # noqa: E731
    x, w, bias, a, b = whole(4, 6, H), whole(VOCAB, H), whole(VOCAB), whole(R, H), whole(VOCAB, R)
    rows = own(rank, split, VOCAB)
    head = {"softcap": 50.0, "temperature": 0.8}
    bias[VOCAB // 2 :] = -torch.inf  # on the last ranks
    told = {"process_group": group, "shard": (rows.start, VOCAB)}
    for k in several:
        for log_probs in (False, True):
            truth = fl.topk(fl.Hidden(x, w, bias, lora=fl.Lora(a, b, 0.5), **head), k, log_probs=log_probs)
            lora = fl.Lora(a, b[rows], 0.5)
            mine = fl.Hidden(x, w[rows], bias[rows], lora=lora, **head, **told)
            found = fl.topk(mine, k, log_probs=log_probs, workspace=1 << 12)
            assert torch.equal(found.ids, truth.ids), (k, log_probs)
            torch.testing.assert_close(found.values, truth.values, rtol=1e-5, atol=1e-5)  # of sums in another order
            gathered = [torch.empty_like(found.values) for _ in split]
            dist.all_gather(gathered, found.values, group=group)
            assert all(torch.equal(part, found.values) for part in gathered)
        z = x @ w.T + bias
        z[0, 0] = torch.nan
        found = fl.topk(fl.Logits(z[..., rows].clone(), process_group=group), k)
        assert torch.equal(found.ids, z.sort(dim=-1, descending=True, stable=True).indices[..., :k])
    with pytest.raises(ValueError, match="k: expected at most the number of tokens, 67, got 68"):
        fl.topk(fl.Logits(z[..., rows], process_group=group), 68)


def refusals(rank, group, split):
    policy, ref, labels = tensors()
    rows = own(rank, split, VOCAB)
    p, q = sources(policy, ref, rows, process_group=group)
    p.hidden.requires_grad_()
    whole = sources(policy, ref)[1]
    for call, words in (
        (lambda: fl.dpo_loss(p, labels, q, plan="row_blocks", shift=False), "plan: 'row_blocks'"),
        (lambda: fl.token_stats(p, labels, plan="frozen_head", shift=False), "plan: 'frozen_head'"),
        (
            lambda: fl.token_stats(p, labels, whole, divergence="js", shift=False),
            "ref: expected the policy's process_group",
        ),
        (lambda: fl.partial_stats(p, labels), "leave process_group out"),
        (lambda: fl.Hidden(p.hidden, p.weight, process_group=group, shard=(60, VOCAB)), "shard: expected"),
        (lambda: fl.Hidden(p.hidden, p.weight, shard=(0, VOCAB)), "without one"),
        (lambda: fl.token_stats(p, labels + VOCAB, shift=False), "labels: expected ids in .0, 67"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_loss(split):
    on_ranks(len(split), check_family, split)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_part_of_a_head(split):
    on_ranks(len(split), check, split)


def test_beside_data_parallel():
    on_ranks(4, check_data)


def test_a_head_as_a_module():
    on_ranks(4, check_modules)


def test_gradients_are_rounded_once():
    on_ranks(4, check_rounding, SPLITS[2])


def test_a_dtensor_head():
    on_ranks(4, check_dtensor)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter")
def test_ranks_of_the_triton_backend(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    on_ranks(2, check_triton, (0.3, 0.7))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_topk(split):
    on_ranks(len(split), check_topk, split, torch.float64, 1, 4, 40, VOCAB)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter")
def test_topk_of_the_triton_backend(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    on_ranks(2, check_topk, (0.95, 0.05), torch.float32, 6)


def test_refusals():
    on_ranks(2, refusals, SPLITS[0])


def test_without_a_group():
    policy, ref, _ = tensors()
    with pytest.raises(ValueError, match="not initialised"):
        sources(policy, ref, process_group=object())
