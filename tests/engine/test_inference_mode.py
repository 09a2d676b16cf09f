"""Tensors that were made under torch.inference_mode, which autograd does not save: every loss takes them, without a copy."""

import pytest
import torch
from family_batches import CASES, FAMILY, Batch, sources_of

import fused_losses as fl
from fused_losses.core.inputs import as_source, ordinary

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = [(name, next(iter(entry.variants))) for name, entry in FAMILY.items()]


@torch.inference_mode()
def made(x):
    """A copy of inference mode."""
    if isinstance(x, dict):
        return {n: made(t) for n, t in x.items()}
    return x.clone() if isinstance(x, torch.Tensor) else x


def reference(batch, kind, made=lambda x: x):
    x, weight = batch.ref_x, batch.ref_weight
    if kind == "hidden":
        return fl.Hidden(made(x), made(weight), lora=(made(weight[:2] * 0.1), made(weight[:, :2]), 0.5))
    if kind == "logits":
        return made(x @ weight.T)
    return (
        None
        if kind is None
        else fl.LogProbs(made(fl.reference.token_stats(fl.Hidden(x, weight), batch.y, shift=False).logps))
    )


def policy(batch, kind, trained=(0, 1), made=lambda x: x):
    """The source and its leaves. trained: states, head; made: what becomes of those that are not."""
    leaves = [batch.x, batch.weight] if kind == "hidden" else [batch.x @ batch.weight.T]
    if kind == "log-probs":
        leaves = [fl.reference.token_stats(leaves[0], batch.y, shift=False).logps]
    leaves = [t.clone().requires_grad_() if i in trained else made(t) for i, t in enumerate(leaves)]
    make = {"hidden": fl.Hidden, "logits": fl.Logits, "log-probs": fl.LogProbs}[kind]
    return make(*leaves), [t for t in leaves if t.requires_grad]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "variant"), FIRST)
def test_all_that_a_loss_is_given(monkeypatch, name, variant, packed):
    """Reference, labels, offsets, num_items and a loss's own inputs; of the policy the states, or the head."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    if packed and FAMILY[name].batch == "tokens":
        pytest.skip("tokens are packed as they come")
    batch = Batch(name, variant, packed)
    batch.options["num_items"] = torch.tensor(7)
    other = Batch(name, variant, packed)
    other.options, other.extra, other.y = made(batch.options), made(batch.extra), made(batch.y)
    for kind, ref in sources_of(batch.entry):
        for trained in ((0, 1), (0,), (1,)) if kind == "hidden" else ((0,),):
            for how in ({"plan": "vocab_chunks"}, {}) if kind == "hidden" else ({},):
                found = []
                for b, f in ((batch, lambda x: x), (other, made)):
                    source, leaves = policy(batch, kind, trained, f)
                    loss = b.loss(fl, torch.float32, source, reference(batch, ref, f), **how).loss
                    found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
                torch.testing.assert_close(*found, rtol=0, atol=0)


S, T = 4, 6
Y, GOOD, OFFSETS = torch.arange(S * T).view(S, T) % 37, torch.arange(S) % 2 == 0, torch.arange(0, S * T + 1, T)
NUMBERS, EACH, ONE = torch.arange(S) * 0.3 - 0.5, torch.arange(S * T).view(S, T) * 0.1 - 1, torch.tensor([3])
MORE = {  # what a loss may be given beside: m makes it
    "baseline": lambda p, m: fl.kto_loss(p, Y, None, GOOD, baseline=m(NUMBERS[3]), shift=False),
    "delta, weights": lambda p, m: fl.bco_loss(p, Y, None, GOOD, delta=m(NUMBERS[3]), weights=m(NUMBERS.square()), shift=False),
    "advantages of tokens": lambda p, m: fl.grpo_loss(p, Y, m(EACH), old_logps=m(EACH - 2), shift=False),
    "nll_labels": lambda p, m: fl.orpo_loss(p, m(Y), nll_labels=m(Y), shift=False, num_items=m(ONE),
                                                   num_nll_tokens=m(ONE)),
    "num_nll_tokens": lambda p, m: fl.preference_loss(p, Y, None, loss_type="sft", shift=False, num_items=m(ONE),
                                                   num_nll_tokens=m(ONE)),
    "sums of the reference": lambda p, m: fl.dpo_loss(p, Y, fl.LogProbs(m(NUMBERS)), shift=False),
    "values": lambda p, m: fl.upo_loss(p, Y, None, (m(NUMBERS), m(-NUMBERS)), shift=False, loss_type=fl.kto_loss,
                                         desirable=m(GOOD)),
    "offsets": lambda p, m: fl.upo_loss(
        fl.Hidden(p.hidden.flatten(0, 1), p.weight), m(Y.view(-1)), None, m(NUMBERS), cu_seqlens=m(OFFSETS), shift=False
    ),
    "a narrow dtype": lambda p, m: fl.cross_entropy_loss(p, m(Y.to(torch.int8)), shift=False),
    "selective_log_softmax": lambda p, m: fl.selective_log_softmax(p.hidden @ p.weight.T, m(Y), row_mask=m(Y > 3)),
    "generalized_jsd_loss": lambda p, m: fl.generalized_jsd_loss(
        p.hidden @ p.weight.T, m(EACH[..., None].expand(-1, -1, 37)), labels=m(Y), num_items_in_batch=m(ONE)
    ),
    "thoughts, mask": lambda p, m: fl.semantic_alignment_loss(p.hidden[:, 0], m(p.hidden.detach()), mask=m(Y > 3)),
    "question, mask": lambda p, m: fl.reasoning_focus_loss(
        m(p.hidden[:, 0].detach()), p.hidden, m(p.hidden[:, 1].detach()), mask=m(Y > 3)
    ),
    "margin": lambda p, m: fl.bradley_terry_loss(p.hidden[..., 0], m(EACH), margin=m(EACH)),
    "mask of places": lambda p, m: fl.plackett_luce_loss(p.hidden[..., 0], mask=m(Y > 3), num_items=m(ONE)),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_what_else_a_loss_is_given(monkeypatch, name):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    leaves, found = [torch.randn(S, T, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)], []
    for m in (lambda x: x, made):
        out = MORE[name](fl.Hidden(*leaves), m)
        loss = (out if isinstance(out, torch.Tensor) else out.loss).sum()
        found.append((loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["preference_loss", "distillation_loss", "grpo_loss", "topk_distillation_loss"])
def test_on_the_triton_backend_too(monkeypatch, device, name):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    batch = Batch(*next(case for case in CASES if case[0] == name), device=device)
    batch.extra, batch.y = made(batch.extra), made(batch.y)
    ref = None if batch.entry.ref == "unused" else "logits"
    source, leaves = policy(batch, "logits")
    loss = batch.loss(fl, torch.float32, source, reference(batch, ref, made)).loss
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(loss, leaves))


def test_nothing_is_copied():
    with torch.inference_mode():
        states, weight = torch.randn(5, 4, 16).transpose(0, 1)[1:, :, ::2], torch.randn(50, 8)
        inside = as_source("ref", fl.Hidden(states, weight))
        assert inside.hidden is states
    source = as_source(
        "ref", fl.Hidden(states, weight, weight[:, 0], lora=(weight[:2], weight[:, :2], 1.0), softcap=3.0)
    )
    assert source.softcap == 3.0
    pairs = [
        (source.hidden, states),
        (source.weight, weight),
        (source.bias, weight[:, 0]),
        (source.lora.b, weight[:, :2]),
    ]
    for mine, theirs in pairs:
        assert not mine.is_inference() and theirs.is_inference() and torch.equal(mine, theirs)
        assert mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()
    plain = fl.Hidden(torch.randn(2, 8), torch.randn(50, 8))
    assert as_source("ref", plain) is plain and ordinary(plain.weight) is plain.weight


def test_a_model_that_was_loaded_there():
    """Its parameters require grad by default: as a reference they are constants, and none can be trained."""
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.randn(50, 8))
        states = torch.randn(4, 6, 8)
    y, x = torch.randint(0, 50, (4, 6)), torch.randn(4, 6, 8, requires_grad=True)
    for loss in (fl.dpo_loss, fl.distillation_loss):
        for plan in ("vocab_chunks", "auto"):
            found = loss(fl.Hidden(x, weight.detach().clone()), y, fl.Hidden(states, weight), plan=plan, shift=False)
            torch.autograd.grad(found.loss, x)
            assert not found.stats.ref_logps.requires_grad
        with pytest.raises(ValueError, match="weight requires grad, but was made under torch.inference_mode"):
            loss(fl.Hidden(x, weight), y, fl.Hidden(states, weight), shift=False)
    with torch.no_grad():
        assert fl.token_stats(fl.Hidden(states, weight), y, shift=False).logps.isfinite().all()
    found = fl.dpo_loss(fl.Hidden(x, weight.requires_grad_(False)), y, fl.Hidden(states, weight), shift=False)
    assert torch.autograd.grad(found.loss, x)[0].any()


def test_a_whole_loss_inside():
    with torch.inference_mode():
        x, weight, y = torch.randn(4, 6, 8), torch.randn(50, 8), torch.randint(0, 50, (4, 6))
        loss = fl.dpo_loss(fl.Hidden(x, weight), y, fl.Hidden(-x, weight), shift=False).loss
        assert loss.is_inference() and loss == fl.dpo_loss(x @ weight.T, y, -x @ weight.T, shift=False).loss
        delta = fl.RunningDelta()
        delta.update(torch.ones(3, dtype=torch.float64))
    assert delta.update(torch.zeros(3, dtype=torch.float64)) == 0.5  # in training, after an evaluation


def test_in_a_model():
    """States from at_head and from a head, of a reference that runs in inference mode."""
    transformers = pytest.importorskip("transformers")
    size = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ref, model = (transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)) for _ in range(2))
    ids = torch.randint(0, 50, (4, 6))
    head = fl.find_head(ref)

    def states():
        return [
            fl.at_head(ref, lambda q: q, input_ids=ids).out,
            head.source(fl.backbone(ref)(ids).last_hidden_state),
            fl.LogProbs(fl.at_head(ref, lambda q: fl.token_stats(q, ids, shift=True).logps, input_ids=ids).out),
        ]

    with torch.no_grad():
        expected = states()
    with torch.inference_mode():
        given = states()
    for q, other in zip(given, expected, strict=True):
        grads = []
        for r in (q, other):
            loss = fl.at_head(model, lambda p, r=r: fl.dpo_loss(p, ids, r, shift=True).loss, input_ids=ids).out
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(*grads)
