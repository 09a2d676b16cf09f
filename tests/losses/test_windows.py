"""Windows of gradient accumulation in which nothing counts (num_items of 0), what else num_items may be, and incoming gradients
that are not finite. What comes of all these depends neither on the plan nor on the source."""

import itertools

import numpy as np
import pytest
import torch
from family_batches import CASES, FAMILY, Batch, H, V

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = (
    "logits",
    "row_blocks",
    "vocab_chunks",
    "vocab_chunks, static",
    "keep_logits",
    "frozen_head",
    "frozen_head, static",
)
NOT_FINITE = (torch.inf, -torch.inf, torch.nan)
PADDED = V + 3
FIRST = [(name, next(iter(entry.variants))) for name, entry in FAMILY.items()]
WITH_NLL = [
    ("preference_loss", "sft"), ("preference_loss", "MPO"), ("simpo_loss", "CPO-SimPO"), ("cpo_loss", "CPO"),
    ("orpo_loss", "ORPO"), ("lta_thinker_loss", "weights"),
]  # fmt: skip


class Window(Batch):
    """A batch whose head has everything, a padded vocabulary too. masked: nothing counts; else one sequence has no token."""

    def __init__(self, name, variant, masked=False, device="cpu"):
        super().__init__(name, variant, device=device)
        shapes = {"weight": (PADDED, H), "bias": (PADDED,), "a": (2, H), "b": (PADDED, 2)}
        self.head_tensors = {n: torch.randn(shape, device=device) * 0.5 for n, shape in shapes.items()}
        self.y[slice(None) if masked else 0] = -100
        if "old_logps" in self.extra:  # the last response is on policy, and so it is not clipped, whatever is drawn
            policy = self.policy(self.x, *self.head_tensors.values())
            self.extra["old_logps"][-1] = fl.token_stats(policy, self.y, shift=False).logps[-1]

    def policy(self, x, weight, bias, a, b):
        return fl.Hidden(x, weight, bias, lora=(a, b, 0.7), valid_vocab=V)

    def step(self, plan, scale=1.0, **options):
        """The loss; and the gradients of scale times it, at the hidden states and, but for "frozen_head", at the whole head."""
        plan, *static = plan.split(", ")
        leaves = {"x": self.x} | self.head_tensors
        leaves = {n: t.clone().requires_grad_(n == "x" or plan != "frozen_head") for n, t in leaves.items()}
        x, weight, bias, a, b = leaves.values()
        ref = None if self.entry.ref == "unused" else fl.Hidden(self.ref_x, self.ref_weight)
        if plan == "logits":
            policy = fl.Logits(x @ weight.T + 0.7 * (x @ a.T) @ b.T + bias, valid_vocab=V)
            ref = ref if ref is None else fl.Logits(self.ref_x @ self.ref_weight.T)
        else:
            policy = self.policy(*leaves.values())
            options |= {"plan": plan, "static_shapes": bool(static)}
        loss = self.loss(fl, torch.float32, policy, ref, **options).loss
        wanted = {n: t for n, t in leaves.items() if t.requires_grad}
        found = torch.autograd.grad(loss * scale, list(wanted.values()), allow_unused=True)
        found = (torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted.values(), strict=True))
        return loss.detach(), dict(zip(wanted, found, strict=True))

    def steps(self, *scales, plans=PLANS, **options):
        """(plan, scale, loss, gradients) of each scale, in every plan that this loss has."""
        for plan, scale in itertools.product(plans, scales):
            try:
                yield plan, scale, *self.step(plan, scale, **options)
            except ValueError as error:
                assert plan == "row_blocks" and "not possible here" in str(error), error


def all_zero(grads):
    return not any(g.any() for g in grads.values())


# ---- num_items = 0 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_where_no_item_counts_all_is_zero(monkeypatch, name, variant, masked):
    """Where the sum is not empty too."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    for plan, _, loss, grads in Window(name, variant, masked).steps(1.0, num_items=torch.tensor(0)):
        assert loss == 0 and all_zero(grads), plan


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["preference_loss", "distillation_loss"])
def test_on_the_triton_backend_too(monkeypatch, device, name, masked):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    batch = Window(*next(case for case in FIRST if case[0] == name), masked, device)
    batch.x, batch.ref_x, batch.y = (t[[0, 3]] for t in (batch.x, batch.ref_x, batch.y))  # the interpreter is slow
    for plan, _, loss, grads in batch.steps(1.0, plans=("logits", "frozen_head, static"), num_items=torch.tensor(0)):
        assert loss == 0 and all_zero(grads), plan
    check_not_finite(batch, masked, torch.nan, plans=("row_blocks", "vocab_chunks, static"))


ZEROS = (
    0, 0.0, np.int64(0), np.float32(0), np.array([0]), torch.tensor(0.0), torch.tensor([0]),
    torch.zeros(1, 1, dtype=torch.float64),
)  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), FIRST)
def test_any_zero_is_an_empty_window(monkeypatch, name, variant):
    """And it stays one however the loss is scaled."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Window(name, variant)
    for zero, scale in zip(ZEROS, itertools.cycle((1.0, 2.0**16, *NOT_FINITE)), strict=False):
        loss, grads = batch.step("auto", scale, num_items=zero)
        assert loss == 0 and loss.shape == () and loss.dtype == torch.float32 and all_zero(grads), zero
    with torch.no_grad():
        ref = None if batch.entry.ref == "unused" else fl.Hidden(batch.ref_x, batch.ref_weight)
        policy = fl.Hidden(batch.x, batch.weight)
        assert batch.loss(fl, torch.float32, policy, ref, num_items=0).loss == 0
        assert batch.loss(fl.reference, torch.float32, policy, ref, num_items=torch.tensor([0])).loss == 0


@pytest.mark.parametrize(("name", "variant"), WITH_NLL)
def test_no_token_of_the_likelihood(monkeypatch, name, variant):
    """num_nll_tokens of 0: the term is 0, as it nearly is for a great number."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Window(name, variant)
    for plan in ("logits", "row_blocks", "vocab_chunks"):
        expected = batch.step(plan, num_nll_tokens=1e25)
        for zero in (0, torch.tensor([0])):
            torch.testing.assert_close(batch.step(plan, num_nll_tokens=zero), expected, rtol=1e-5, atol=1e-12)
    ref = None if batch.entry.ref == "unused" else fl.Hidden(batch.ref_x, batch.ref_weight)
    twin = batch.loss(fl.reference, torch.float32, fl.Hidden(batch.x, batch.weight), ref, num_nll_tokens=0).loss
    mine = batch.loss(fl, torch.float32, fl.Hidden(batch.x, batch.weight), ref, num_nll_tokens=0).loss
    torch.testing.assert_close(mine, twin)


X, Y3, Y2 = torch.randn(4, 3), torch.randn(4, 2, 3), torch.randn(4, 2)
PLAIN = {  # losses without a batch of tokens
    "bradley_terry": lambda f, x, n: f.bradley_terry_loss(x[:, 0], x[:, 1], num_items=n),
    "plackett_luce": lambda f, x, n: f.plackett_luce_loss(x, num_items=n),
    "expectile": lambda f, x, n: f.expectile_loss(X, x, num_items=n),
    "alignment": lambda f, x, n: f.semantic_alignment_loss(x, Y3, num_items=n),
    "focus": lambda f, x, n: f.reasoning_focus_loss(x, Y3, X, num_items=n),
    "no steps": lambda f, x, n: f.reasoning_focus_loss(x, Y3[:, :0], X, num_items=n),
    "generalized_jsd": lambda f, x, n: f.generalized_jsd_loss(x[:, None], X[:, None], num_items_in_batch=n),
}


@pytest.mark.parametrize("name", PLAIN)
def test_losses_without_tokens(monkeypatch, name):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    x = torch.randn(4, 3, requires_grad=True)
    for zero in ZEROS:
        loss = PLAIN[name](fl, x, zero)
        assert loss == 0 and loss.shape == () and not torch.autograd.grad(loss * torch.inf, x)[0].any()
        assert PLAIN[name](fl.reference, x, zero) == 0
    for seven in SEVENS:
        torch.testing.assert_close(PLAIN[name](fl, x, seven), PLAIN[name](fl, x, 7))


# ---- what else it may be ------------------------------------------------------------------------------------------------


SEVENS = (
    7.0, np.int64(7), np.float32(7), np.array([7]), torch.tensor(7), torch.tensor([7]), torch.tensor([[7]], dtype=torch.int32),
    torch.tensor([7.0], dtype=torch.float64), torch.tensor([7.0], dtype=torch.bfloat16),
)  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), FIRST + WITH_NLL)
def test_a_number_of_any_kind(monkeypatch, name, variant):
    """The loss is a 0-d tensor of its own dtype in each case."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch = Window(name, variant)
    names = ["num_items", *["num_nll_tokens"] * ((name, variant) in WITH_NLL)]
    expected = batch.step("auto", **dict.fromkeys(names, 7))
    for seven in SEVENS:
        torch.testing.assert_close(batch.step("auto", **dict.fromkeys(names, seven)), expected)


@pytest.mark.parametrize("name", ["num_items", "num_nll_tokens"])
@pytest.mark.parametrize(
    "wrong", [-1, -0.5, float("nan"), float("inf"), "3", torch.ones(2), torch.ones(0), np.ones(2)], ids=repr
)
def test_no_number(name, wrong):
    z, y = torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.long)
    shapes = {(): "", (0,): r"\[0\]", (2,): r"\[2\]"}
    words = f"{name}: expected a finite number >= 0 or a tensor of one element, got " + shapes[np.shape(wrong)]
    calls = [
        lambda f, n: f.cpo_loss(z, y, **n, shift=False),
        lambda f, n: f.preference_loss(z, y, None, loss_type="sft", **n, shift=False),
    ]
    for f, call in itertools.product((fl, fl.reference), calls):
        with pytest.raises(ValueError, match=words):
            call(f, {name: wrong})


def test_compiled(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    torch._dynamo.reset()
    z, y = torch.randn(4, 3, 7, requires_grad=True), torch.zeros(4, 3, dtype=torch.long)
    step = torch.compile(
        lambda z, n: fl.cpo_loss(z, y, num_items=n, num_nll_tokens=n, shift=False).loss, fullgraph=True, backend="eager"
    )
    for count in (torch.tensor([0]), torch.tensor([7]), 0):
        loss, eager = step(z, count), fl.cpo_loss(z, y, num_items=count, num_nll_tokens=count, shift=False).loss
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(eager, z))
        assert loss.shape == () and (loss == 0) == (count == 0)
    torch._dynamo.reset()


# ---- gradients that are not finite --------------------------------------------------------------------------------------


def check_not_finite(batch, masked, *scales, plans=PLANS):
    """Zeros where nothing counts. Elsewhere every plan has the same finite numbers, which are zeros too."""
    expected = {s: batch.step(plans[0], s)[1] for s in scales}
    for plan, scale, _, grads in batch.steps(*scales, plans=plans):
        assert all_zero(grads) == masked
        assert masked or plan.startswith("frozen_head") or not grads["weight"][:V].isfinite().any()
        for n, g in grads.items():
            where = f"{plan}, {scale}: {n}"
            assert torch.equal(g.isfinite(), expected[scale][n].isfinite()), where
            assert not g[g.isfinite()].any(), where


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_gradient_that_is_not_finite(monkeypatch, name, variant, masked):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    scales = NOT_FINITE if (name, variant) in FIRST else NOT_FINITE[2:]
    check_not_finite(Window(name, variant, masked), masked, *scales)


@pytest.mark.parametrize("scale", [1.0, *NOT_FINITE])
def test_at_log_probs_of_the_reference(monkeypatch, scale):
    """That want a gradient, as the policy does."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    batch, found = Window("preference_loss", "sigmoid"), {}
    for plan in ("vocab_chunks", "row_blocks"):
        leaves = [t.clone().requires_grad_() for t in (batch.x, batch.weight, torch.full(batch.y.shape, -3.0))]
        x, weight, ref = leaves
        loss = fl.dpo_loss(fl.Hidden(x, weight), batch.y, fl.LogProbs(ref), plan=plan, shift=False).loss
        found[plan] = torch.autograd.grad(loss * scale, leaves)
    for g, t in zip(*found.values(), strict=True):
        assert g.any() and torch.equal(g.isfinite(), t.isfinite())
        torch.testing.assert_close(g.nan_to_num(0, 0, 0), t.nan_to_num(0, 0, 0))
