"""What plans promise: the matrix products they count, the memory they hold, and the rule by which slices merge."""

import itertools

import pytest
import torch
from helpers import asking, hidden_leaves, hidden_source, labels_for, products, promised_near, relative, seeded

import fused_losses as fl
from fused_losses import divergences
from fused_losses.backends import torch_backend
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.core.batch import token_batch
from fused_losses.core.layout import Outputs, StatsSpec, saved_rows, term_rows, write_divergence
from fused_losses.core.moments import fields
from fused_losses.engine import planner
from fused_losses.engine.prepare import ExecutionOptions, prepare_call

NAMES = divergences.names()
DIVS = tuple(divergences.get(n) for n in NAMES)
MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("one_thread")


class Step:
    """A loss step from hidden states, four rows a sequence, and its plan."""

    def __init__(
        self,
        device,
        rows,
        vocab,
        plan,
        workspace=None,
        ref=None,
        divergence=None,
        entropy=False,
        grads=("x", "w"),
        width=16,
        dtype=torch.float32,
        static=False,
        masked=False,
        rank=0,
    ):
        lead = (rows // 4, 4)
        self.policy = hidden_leaves(lead, width, vocab, device, rank=rank, bias="bias" in grads, dtype=dtype)
        self.given = hidden_leaves(lead, width, vocab, device, bias=False, dtype=dtype)
        names = ("x", "w", "bias", "a", "b", "ref_x", "ref_w")
        for name, x in zip(names, [*self.policy, *self.given[:2]], strict=True):
            if x is not None:
                x.requires_grad_(name in grads)
        self.y = torch.randint(0, vocab, lead, device=device)
        if masked:
            self.y[:, 1:3] = -100
        source = hidden_source(self.policy), None
        if ref == "hidden":
            source = source[0], hidden_source(self.given)
        elif ref == "logits":
            source = source[0], fl.Logits(torch.randn(*lead, vocab, device=device, dtype=dtype))
        self.source, self.asked, self.entropy = source, divergences.parse(divergence), entropy
        self.how = {"plan": plan, "workspace": workspace, "static_shapes": static}
        self.leaves = asking([*self.policy, *self.given])
        # rows of a unit of a loss that is known: tokens where a divergence is its subject, else pairs
        self.unit = 0 if plan != "row_blocks" else 1 if self.asked else 8

    @property
    def plan(self):
        """What the planner says."""
        batch = token_batch(self.y, shift=False, ignore_index=-100)
        rest = self.asked, self.entropy, False, ExecutionOptions(**self.how), self.unit
        return prepare_call(self.source[0], batch, self.source[1], *rest).plan

    def run(self):
        if self.unit == 1:
            options = {"divergence": self.asked[0], "hard": 0.5, "entropy": self.entropy, **self.how}
            loss = fl.distillation_loss(self.source[0], self.y, self.source[1], **options, shift=False).loss
        elif self.unit:
            loss = fl.dpo_loss(
                self.source[0], self.y, self.source[1], entropy=self.entropy, **self.how, shift=False
            ).loss
        else:
            options = {"divergence": self.asked, "entropy": self.entropy, **self.how}
            stats = fl.token_stats(self.source[0], self.y, self.source[1], **options, shift=False)
            loss = stats.logps.sum() + sum(d.sum() for d in stats.divergence.values())
            if self.entropy:
                loss = loss + stats.entropy.sum()
            if stats.ref_logps is not None and stats.ref_logps.requires_grad:
                loss = loss + stats.ref_logps.sum()
        return torch.autograd.grad(loss, self.leaves) if self.leaves else loss


def test_row_blocks_are_of_equal_size_large_and_few():
    inputs = planner.PlanInputs(
        4096, 50304, 512, 512, 4, 4, True, pair=True, grad_hidden=True, grad_head=True, grad_weight=True, unit=1
    )
    plan = planner.make_plan(inputs._replace(weight=50304 * 512))
    assert plan.kind == "row_blocks" and plan.gemms == 4
    assert 4096 % plan.tile[0] <= plan.tile[0] // 8 or -(-4096 // plan.tile[0]) * plan.tile[0] - 4096 < 64
    assert plan.tiles <= planner.CPU_BLOCK
    assert planner.make_plan(inputs._replace(device="cuda")).tiles > planner.CPU_BLOCK
    for few in (inputs._replace(vocab=4_000_000), inputs._replace(unit=2048), inputs._replace(rows=1 << 22)):
        assert planner.make_plan(few).kind == "vocab_chunks"
    assert planner.make_plan(inputs._replace(unit=4096), "row_blocks", 4 << 30).tile == (4096, 50304)


# ---- matrix products ---------------------------------------------------------------------------------------------------

X, W, XW = ("x",), ("w",), ("x", "w")
BOTH = ("x", "w", "ref_x", "ref_w")
STEPS = [  # plan, reference, divergence, entropy, gradients to, products
    ("vocab_chunks", None, None, False, (), 1), ("vocab_chunks", None, None, True, X, 3),
    ("vocab_chunks", None, None, False, W, 3),
    ("vocab_chunks", None, None, False, XW, 4), ("vocab_chunks", "hidden", None, False, XW, 5), ("vocab_chunks",
    "logits", None, False, XW, 4),
    ("vocab_chunks", "hidden", "forward_kl", False, XW, 6), ("vocab_chunks", "hidden", NAMES, True, XW, 8),
    ("vocab_chunks", "logits", ["js"], False, XW, 5), ("vocab_chunks", "hidden", None, False, BOTH, 8),
    ("vocab_chunks", "hidden", "reverse_kl", False, BOTH, 8), ("vocab_chunks", "hidden", "js", False, BOTH, 10),
    ("keep_logits", None, None, False, XW, 3), ("keep_logits", "hidden", None, False, XW, 4), ("keep_logits", "hidden",
    "js", False, XW, 4),
    ("keep_logits", "hidden", ["js", "forward_kl"], True, BOTH, 6), ("keep_logits", "hidden", "forward_kl", False, X, 3),
    ("frozen_head", None, None, False, X, 2), ("frozen_head", None, None, True, X, 3), ("frozen_head",
    "hidden", None, False, X, 3),
    ("frozen_head", "hidden", "forward_kl", False, X, 4), ("frozen_head", "hidden", ["forward_kl", "alpha"], False, X, 5),
    ("frozen_head", "hidden", "jeffreys", False, X, 7), ("frozen_head", "hidden", ["jeffreys", "reverse_kl"], True, X, 8),
    ("frozen_head", "hidden", "js", False, X, 6), ("frozen_head", "logits", "js", True, X, 5),
    ("row_blocks", None, None, False, XW, 3), ("row_blocks", "hidden", None, True, XW, 4), ("row_blocks",
    "hidden", None, False, X, 3),
    ("row_blocks", "logits", None, False, W, 2), ("row_blocks", "hidden", "forward_kl", True, XW, 4),
    ("row_blocks", "hidden", "js", False, XW, 4), ("row_blocks", "hidden", "alpha", False, X, 3), ("row_blocks",
    "logits", "js", False, XW, 3),
]  # fmt: skip


def id_of(step):
    plan, ref, divergence, entropy, grads, _ = step
    asked = (
        "all" if divergence is NAMES else "+".join([divergence] if isinstance(divergence, str) else divergence or [])
    )
    return "-".join([plan, f"ref_{ref}", asked or "none", *["entropy"] * entropy, "+".join(grads) or "no_grad"])


def multiplied(step, rows):
    """Products of so many rows, all columns and all features that torch ran."""
    vocab, width = step.policy[1].shape
    return sum(m * n * k for m, n, k in products(step.run)) / (rows * vocab * width)


def few_bytes(rows, vocab, plan, divergence):
    """A workspace that cuts this step into some tens of tiles."""
    if plan == "keep_logits":
        return None
    if plan == "row_blocks":
        kinds = planner.PlanInputs(rows, vocab, 16, 16, 4, 4, True, backend="torch", pair=bool(divergence))
        return planner.rows_bytes(kinds, 8)
    return 4096 * 25


@pytest.mark.parametrize("case", STEPS, ids=id_of)
def test_the_products_that_run_are_those_of_the_plan(device, monkeypatch, case):
    """In tiles, counted by the floating-point operations of every product."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    plan, ref, divergence, entropy, grads, wanted = case
    step = Step(device, 16, 320, plan, few_bytes(16, 320, plan, divergence), ref, divergence, entropy, grads)
    assert step.plan.kind == plan and step.plan.gemms == wanted
    assert plan == "keep_logits" or step.plan.tile[0] * step.plan.tile[1] < 16 * 320
    assert multiplied(step, 16) == wanted


@pytest.mark.parametrize(
    ("plan", "static"), [(p, static) for p in ("vocab_chunks", "keep_logits",
    "frozen_head") for static in (False, True)] + [("row_blocks", False)]
)  # fmt: skip
def test_rows_that_do_not_count_are_not_multiplied(backend, device, plan, static):
    """They are with static shapes, which ask no number of the device."""
    rows = 16
    step = Step(
        device,
        rows,
        48,
        plan,
        None,
        "hidden",
        None,
        False,
        X if plan == "frozen_head" else XW,
        static=static,
        masked=True,
    )
    found = multiplied(step, rows if static else rows // 2)
    # a tile kernel may make the reference's logits, where nothing else needs them
    assert found == step.plan.gemms or (backend == "triton" and plan == "row_blocks" and found == step.plan.gemms - 1)


def test_the_shift_costs_no_product(device, monkeypatch):
    """The last position predicts nothing."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    step = Step(device, 16, 48, "vocab_chunks")
    run = lambda: fl.token_stats(step.source[0], step.y, shift=True, plan="vocab_chunks").logps.sum().backward()  # noqa: E731
    assert sum(m * n * k for m, n, k in products(run)) == 4 * 12 * 48 * 16


@pytest.mark.parametrize(
    ("grads", "rank", "wide", "narrow"),
    [(("bias",), 0, 2, 0), (("a",), 4, 2, 3), (("b",), 4, 2, 3), (("a", "b"), 4, 2, 4), (("x", "a", "b"), 4, 3, 4)],
)  # fmt: skip
def test_products_of_a_head_that_learns_in_part(device, monkeypatch, grads, rank, wide, narrow):
    """A bias needs no product beyond the logits, factors of rank r only those with r columns; and the plan says so."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    step = Step(device, 20, 320, "vocab_chunks", 4096 * 25, grads=grads, rank=rank)
    found = [(m * n * k, rank and rank in (m, n, k)) for m, n, k in products(step.run) if (m, n, k).count(16) < 2]
    assert sum(f for f, low in found if not low) == wide * 20 * 320 * 16
    between = 20 * 16 * rank  # hidden states and factor a
    assert sum(f for f, low in found if low and f > between) == narrow * 20 * 320 * rank
    assert step.plan.gemms == wide


def test_auto_takes_the_fewest_products(device, monkeypatch):
    """Of the plans that fit, in every step above whose loss is not known inside."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    for plan, ref, divergence, entropy, grads, _ in STEPS:
        if plan == "row_blocks" or not grads:
            continue
        for workspace in (4096 * 25, 1 << 26):
            build = lambda p, ws=workspace, o=(ref, divergence, entropy, grads): Step(device, 16, 320, p, ws, *o)  # noqa: E731
            counts = []
            for other in set(planner.KINDS) - {"row_blocks"}:
                try:
                    counts.append(build(other).plan.gemms)
                except ValueError:
                    continue
            assert build("auto").plan.gemms == min(counts), (plan, ref, divergence, grads, workspace)


# ---- memory ------------------------------------------------------------------------------------------------------------


def held(step):
    """Bytes at the peak of a step beyond inputs, gradients, what the plan keeps, and numbers of its rows: tiles."""
    rows, width = step.y.numel(), step.policy[1].shape[1]
    numbers = fields(len({d.power for d in step.asked if d.power is not None})) + 2 * saved_rows(len(step.asked))
    numbers += 5 + len(step.asked) + width * (1 + (step.source[1] is not None))
    gradients = sum(x.numel() * x.element_size() for x in step.leaves)
    return peak_bytes(step.run) - gradients - step.plan.kept - rows * numbers * 4


HELD = [  # plan, reference, divergence, entropy, gradients, dtype, masked; how far above what is held the plan may be
    ("vocab_chunks", None, None, False, XW, torch.float32, False, 3.4),
    ("vocab_chunks", None, None, False, XW, torch.bfloat16, False, 3.4),
    ("vocab_chunks", "hidden", None, False, XW, torch.float32, True, None),
    ("vocab_chunks", "hidden", "forward_kl", False, BOTH, torch.float32, False, 3.4),
    ("vocab_chunks", "hidden", ["js", "alpha"], True, XW, torch.bfloat16, False, 3.4),
    ("frozen_head", None, None, False, X, torch.float32, False, 3.4),
    ("frozen_head", "hidden", ["forward_kl"], True, X, torch.float32, False, 3.4),
    ("keep_logits", "hidden", "js", False, XW, torch.float32, False, 3.4),
    ("row_blocks", "hidden", None, False, XW, torch.float32, False, 3.4),
    ("row_blocks", "hidden", None, True, XW, torch.bfloat16, False, 3.4),
]  # fmt: skip


@pytest.mark.parametrize("case", HELD, ids=lambda c: "-".join([c[0], str(c[1]), str(c[2]), str(c[5])]))
def test_a_step_holds_what_its_plan_says(device, monkeypatch, case):
    """Never more, and not much less, so that the workspace is used. (The most is planned for: a lone log-prob needs a third
    of the torch backend's temporaries, and rows that do not count take nothing.)"""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    plan, ref, divergence, entropy, grads, dtype, masked, above = case
    workspace = 28 * MIB if plan in ("row_blocks", "keep_logits") else 24 * MIB
    rows, vocab = (256, 4096) if plan != "keep_logits" else (128, 2048)
    step = Step(device, rows, vocab, plan, workspace, ref, divergence, entropy, grads, 64, dtype, masked=masked)
    assert step.plan.kind == plan and step.plan.tiles <= workspace
    tiles = held(step)
    assert tiles <= step.plan.tiles, f"{tiles / MIB:.2f} MiB of {step.plan.tiles / MIB:.2f}"
    assert above is None or step.plan.tiles <= above * tiles, f"{tiles / MIB:.2f} MiB of {step.plan.tiles / MIB:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "ref", "divergence", "grads"),
    [("vocab_chunks", None, None, XW), ("vocab_chunks", "hidden", "forward_kl", XW), ("frozen_head", None, None, X),
    ("row_blocks", None, None, X)],
)  # fmt: skip
def test_memory_does_not_grow_with_rows_times_vocabulary(device, monkeypatch, plan, ref, divergence, grads):
    """64 times as many logits in the same workspace."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    small, large = (
        Step(device, rows, vocab, plan, 2 * MIB, ref, divergence, False, grads, 64)
        for rows, vocab in ((64, 1024), (512, 8192))
    )
    few, many = held(small), held(large)
    assert many <= large.plan.tiles <= 2 * MIB
    assert many <= 1.25 * max(few, MIB), f"{few / MIB:.2f} MiB, {many / MIB:.2f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["vocab_chunks", "frozen_head"])
def test_memory_of_the_triton_backend(device, monkeypatch, plan):
    """Kernels hold nothing beside the tiles."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    step = Step(device, 8, 200, plan, 4500, "hidden", None, False, X if plan == "frozen_head" else XW)
    tiles = held(step)
    assert step.plan.tile[1] < 200 and tiles <= step.plan.tiles <= 4500


# ---- the merge rule ----------------------------------------------------------------------------------------------------


def backend_of(name):
    if name == "torch":
        return torch_backend
    from fused_losses.kernels import launch

    return launch


POWERS = len({d.power for d in DIVS if d.power is not None})
CUTS = [[0, 40, 77], [0, 1, 30, 77], [0, 3, 5, 20, 21, 50, 76, 77]]


def whole_problem(vocab):
    return StatsSpec(DIVS, True, True, False, -100, vocab, 0.0, 1.0, 5.0, 0.7)


def part_of(problem, start, end, *tensors):
    return problem._replace(vocab=end - start, first=start), *(x[:, start:end].contiguous() for x in tensors)


def blank_outputs(rows, device):
    n = len(DIVS)
    *floats, collision = (torch.full((rows,), torch.nan, device=device) for _ in range(5))
    hit = torch.zeros(rows, dtype=torch.bool, device=device)
    div, saved = (torch.full((k, rows), torch.nan, device=device) for k in (n, saved_rows(n)))
    return Outputs(*floats, div, hit, collision, saved)


def state_of(backend, problem, z, w, y, start, end):
    """The sums over one part of the vocabulary."""
    state = torch.full((fields(POWERS), len(y)), torch.nan, device=z.device)
    part, z, w = part_of(problem, start, end, z, w)
    backend.fold(part, z, y, w, state, True)
    return state


def folded(backend, problem, z, w, y, cuts):
    """Slice after slice into one state."""
    state = torch.full((fields(POWERS), len(y)), torch.nan, device=z.device)
    for start, end in zip(cuts, cuts[1:], strict=False):
        part, zs, ws = part_of(problem, start, end, z, w)
        backend.fold(part, zs, y, ws, state, start == 0)
    return state


def merged(backend, problem, states, order):
    """order: a permutation, merged one after another, or "tree"."""
    states = [s.clone() for s in states]
    if order == "tree":
        while len(states) > 1:
            pairs = [states[i : i + 2] for i in range(0, len(states), 2)]
            for pair in pairs:
                if len(pair) == 2:
                    backend.merge_states(problem, pair[0], pair[1])
            states = [pair[0] for pair in pairs]
        return states[0]
    first, *others = (states[i] for i in order)
    for other in others:
        backend.merge_states(problem, first, other)
    return first


def closed(backend, problem, state, z, w, y, cuts):
    """Named outputs of the rows that count."""
    out = blank_outputs(len(y), z.device)
    backend.close(problem, state, y, out)
    sums = torch.zeros(2 * len(DIVS), len(y), device=z.device)
    for start, end in zip(cuts, cuts[1:], strict=False):
        part, zs, ws = part_of(problem, start, end, z, w)
        backend.terms(part, zs, y, ws, out.saved, sums)
    for i, d in enumerate(DIVS):
        if d.term is not None:
            write_divergence(problem, i, *(sums[at] for at in term_rows(i)), slice(None), out)
    return by_name(out, y != -100)


def by_name(out, here):
    names = ("logps", "ref_logps", "lse", "entropy", "hit", "collision")
    named = {name: getattr(out, name) for name in names} | dict(zip(NAMES, out.divergence, strict=True))
    return {k: v[here] for k, v in named.items()}


def truth_of(z, w, y):
    found = fl.reference.token_stats(
        fl.Logits(z.double()),
        y,
        fl.Logits(w.double(), softcap=5.0, scale=0.7),
        divergence=NAMES,
        entropy=True,
        collision=True,
        shift=False,
    )
    named = {k: getattr(found, k) for k in ("logps", "ref_logps", "lse", "entropy", "collision")} | found.divergence
    return {"hit": found.correct[y != -100]} | {k: v[y != -100] for k, v in named.items()}


def one_slice(backend, problem, z, w, y):
    """The kernels that see whole rows."""
    out = blank_outputs(len(y), z.device)
    backend.forward(problem, z, y, w, out)
    return by_name(out, y != -100)


def rows_with_suppressed_tokens(device, spread=1.0, vocab=77):
    """Nine rows: -inf regions that fill whole parts, on one or both sides, and labels in every part."""
    z = torch.randn(9, vocab, device=device) * 3
    w = z + torch.randn(9, vocab, device=device) * spread
    z[0, 3], w[0, 3] = -torch.inf, -torch.inf
    z[2, :40], w[2, :40] = -torch.inf, -torch.inf  # a part that is empty on both sides, the first
    z[3, 40:], w[3, 40:] = -torch.inf, -torch.inf  # the last
    z[4, 5:20], z[4, 30:50] = -torch.inf, -torch.inf  # of the policy alone
    w[5, :30] = -torch.inf  # of the reference alone
    w[5, 76] = -torch.inf
    y = torch.tensor([0, -100, 60, 2, 21, 75, 76, 20, 45], device=device)
    return z, w, y


def few_rows(backend, *tensors):
    """The interpreter takes some of them only."""
    return tensors if backend == "torch" else [x[:6] for x in tensors]


@pytest.mark.parametrize(
    ("backend", "cuts"), [*(("torch", c) for c in CUTS), ("triton", CUTS[1])], indirect=["backend"],
    ids=lambda x: x if isinstance(x, str) else f"{len(x) - 1} parts",
)  # fmt: skip
def test_slices_fold_into_the_whole(backend, device, cuts):
    code, problem = backend_of(backend), whole_problem(77)
    z, w, y = few_rows(backend, *rows_with_suppressed_tokens(device))
    found = closed(code, problem, folded(code, problem, z, w, y, cuts), z, w, y, cuts)
    check_against(found, one_slice(code, problem, z, w, y), truth_of(z, w, y))


def check_against(found, whole, truth):
    """Infinite where the truth is; finite numbers within 2e-6, or no worse than three times the unsplit ones."""
    assert torch.equal(found["hit"], truth["hit"])
    for name, true in truth.items():
        if name == "hit":
            continue
        assert torch.equal(found[name].isinf(), true.isinf()) and not found[name].isnan().any(), name
        here = true.isfinite()
        error, unsplit = (relative(x[name][here], true[here]) for x in (found, whole))
        assert error <= max(2e-6, 3 * unsplit), f"{name}: {error:.1e}, unsplit {unsplit:.1e}"


ORDERS = [(len(cuts) - 1, order) for cuts in CUTS for order in ("tree", "forwards", "backwards", "shuffled")]
BY_LENGTH = {len(cuts) - 1: cuts for cuts in CUTS}


@pytest.mark.parametrize(
    ("backend", "order"),
    [*(("torch", o) for o in ORDERS), *(("triton", (n, o)) for n, o in [(7, "tree"), (3, "shuffled"), (2, "backwards")])],
    indirect=["backend"], ids=str,
)  # fmt: skip
def test_parts_merge_in_any_order(backend, device, order):
    cuts, order = BY_LENGTH[order[0]], order[1]
    code, problem = backend_of(backend), whole_problem(77)
    z, w, y = few_rows(backend, *rows_with_suppressed_tokens(device))
    states = [state_of(code, problem, z, w, y, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    n = len(states)
    orders = {"forwards": range(n), "backwards": range(n)[::-1], "shuffled": torch.randperm(n).tolist()}
    state = merged(code, problem, states, orders.get(order, order))
    check_against(closed(code, problem, state, z, w, y, cuts), one_slice(code, problem, z, w, y), truth_of(z, w, y))


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
@pytest.mark.parametrize(("backend", "offset"), [("torch", 0.0), ("torch", 5.0), ("triton", 5.0)], indirect=["backend"])
def test_merging_near_the_reference(backend, device, spread, offset):
    """Where p is almost q: what the documents promise, or no worse than three times the rows unsplit; never negative."""
    code, rows = backend_of(backend), 32 if backend == "torch" else 6
    problem = StatsSpec(DIVS, True, True, False, -100, 509, 0.0, 1.0, 0.0, 1.0)
    z = torch.randn(rows, 509, device=device) * 2
    w = z + torch.randn(rows, 509, device=device) * spread + offset
    y = torch.tensor([0, 200, 508, 333] * 8, device=device)[:rows]
    whole = one_slice(code, problem, z, w, y)
    found = fl.reference.token_stats(z.double(), y, w.double(), divergence=NAMES, shift=False).divergence
    cuts = [0, 100, 101, 300, 310, 450, 508, 509] if backend == "torch" else [0, 101, 509]
    states = [state_of(code, problem, z, w, y, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    for order in ("tree", range(7), [4, 0, 6, 2, 5, 1, 3])[: 3 if backend == "torch" else 1]:
        parts = closed(code, problem, merged(code, problem, states, order), z, w, y, cuts)
        for name in NAMES:
            error, unsplit = relative(parts[name], found[name]), relative(whole[name], found[name])
            allowed = promised_near(name, found[name], torch.full_like(found[name], spread), offset)
            kept = ((parts[name] - found[name]).abs() <= allowed).all()
            words = f"{name}: {error:.1e}, unsplit {unsplit:.1e}"
            assert (parts[name] >= 0).all() and (kept or error <= 3 * unsplit), words


def test_partial_stats_are_that_rule(backend, device):
    """The public face: parts of logits and of a head, merged in two groupings."""
    names = [n for n in NAMES if divergences.get(n).row is not None]
    x, weight = torch.randn(4, 6, device=device), torch.randn(53, 6, device=device)
    y = labels_for((4,), 53, device)
    z, w = x @ weight.T, torch.randn(4, 53, device=device)
    cuts = [(0, 10), (10, 11), (11, 40), (40, 53)]
    options = {"divergence": names, "entropy": True, "collision": True}
    logits = [fl.partial_stats(z[:, a:b], y, w[:, a:b], first=a, **options) for a, b in cuts]
    heads = [fl.partial_stats(fl.Hidden(x, weight[a:b]), y, w[:, a:b], first=a, **options) for a, b in cuts]
    truth = fl.reference.token_stats(z.double(), y, w.double(), **options, shift=False)
    grouped = fl.merge_stats([fl.merge_stats(logits[2:]), fl.merge_stats(logits[:2])])
    for merged_parts in (fl.merge_stats(logits), grouped, fl.merge_stats(heads[::-1])):
        found = merged_parts.close()
        assert torch.equal(found.correct, truth.correct)
        for name in ("logps", "ref_logps", "lse", "entropy", "collision"):
            assert relative(getattr(found, name), getattr(truth, name)) <= 1e-6, name
        for name in names:
            assert relative(found.divergence[name], truth.divergence[name]) <= 2e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_forward_are_given_away_once(device, dtype):
    """In place of a copy; backward a second time takes them anew, and leaves the first ones alone."""
    seeded(3)
    x, w = torch.randn(4, 5, 16, device=device), torch.randn(301, 16, device=device)
    x, w = (t.to(dtype).requires_grad_() for t in (x, w))
    y = torch.randint(0, 301, (4, 5), device=device)
    out = fl.dpo_loss(fl.Hidden(x, w), y, None, plan="row_blocks", shift=False)
    first = torch.autograd.grad(3 * out.loss, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(3 * out.loss, (x, w), retain_graph=True)
    half = torch.autograd.grad(1.5 * out.loss, (x, w))
    for a, b, c, h in zip(first, kept, again, half, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
        tolerance = 2e-6 if dtype == torch.float32 else 1e-2
        for other in (c, 2 * h):
            assert (other.double() - a.double()).norm() <= tolerance * a.double().norm()


def test_a_float32_head_has_one_gradient(device, monkeypatch):
    """Nothing as large as dW lies beside it."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch" if device.type == "cpu" else "triton")
    x, w = torch.randn(2, 8, 256, device=device), torch.randn(20_000, 256, device=device)
    x, w = x.requires_grad_(), w.requires_grad_()
    y = torch.randint(0, 20_000, (2, 8), device=device)

    def step():
        fl.dpo_loss(fl.Hidden(x, w), y, None, plan="row_blocks", shift=False).loss.backward()

    beyond = peak_bytes(step) - x.nbytes - w.nbytes
    assert beyond < 0.75 * w.nbytes, f"{beyond / MIB:.1f} MiB beside {w.nbytes / MIB:.1f}"


@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_on_a_gpu_are_wide_and_alike(ref, itemsize):
    """A kernel has few instructions an entry only where a row is not shorter than a step (python -m bench static)."""
    for rows, vocab in itertools.product((1024, 4096, 16384, 65536), (32000, 50257, 128256, 151936, 262144)):
        inputs = planner.PlanInputs(rows, vocab, 4096, 4096 * ref, itemsize, 4, ref, "cuda", "triton", pair=ref)
        inputs = inputs._replace(grad_hidden=True, grad_head=True, grad_weight=True, weight=vocab * 4096)
        plan = planner.make_plan(inputs, "vocab_chunks")
        chunk = plan.tile
        assert chunk.columns == vocab or (chunk.columns % planner.LANES == 0 and chunk.columns >= planner.STEP)
        assert chunk.rows >= min(rows, 1024) and plan.tiles <= planner.DEFAULT_WORKSPACE
        number = -(-vocab // chunk.columns)
        assert number * (chunk.columns - planner.LANES) < vocab  # no narrower chunks would be as few
