"""TRL's entry points on our operators: every output and gradient against TRL's own and float64, and what the patch leaves."""

from __future__ import annotations

import copy
import importlib
import sys
import types

import pytest
import torch
from helpers import EPS, generator_of, python, relative, seed_of, seeded

import fused_losses as fl
from fused_losses.integrations import trl_kernels

trl = pytest.importorskip("trl")
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

N, VOCAB, HIDDEN, WIDE = 13, 61, 16, 12
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HEADS = {
    "plain": (1.0, None, 1.0, True),
    "temperature": (0.7, None, 1.0, False),
    "scale": (0.9, None, 0.3, True),
    "softcap": (0.7, 2.0, 1.0, True),
    "all": (1.3, 3.0, 0.4, False),
}  # temperature, softcap, scale, bias


@pytest.fixture(autouse=True)
def unpatched():
    """Whatever a test does, TRL is left as it was."""
    before = names()
    yield
    now = names()  # of modules that the test imported, too
    assert {where: now[where] for where in before} == before
    assert "apply" not in {**vars(ChunkedLogProbFunction), **vars(ChunkedDivergenceFunction)}
    ours = [f for f in vars(trl_kernels).values() if getattr(f, "__module__", "") == trl_kernels.__name__]
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl":
            assert not any(x is f for x in list(vars(module).values()) for f in ours), name


def names():
    """Every name of a TRL module that holds one of the functions, or one of ours."""
    holders = (utils, importlib.import_module("trl.kernels"))
    wanted = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
    known = {id(vars(m)[n]) for m in holders for n in wanted if n in vars(m)}
    modules = [(n, m) for n, m in list(sys.modules.items()) if n.split(".")[0] == "trl"]
    return {(n, k): id(x) for n, m in modules for k, x in list(vars(m).items()) if id(x) in known}


@pytest.fixture
def count(monkeypatch):
    """How often our primitive ran."""
    seen = []

    def counted(*args, **options):
        seen.append(args)
        return fl.token_stats(*args, **options, shift=False)

    monkeypatch.setattr(trl_kernels, "token_stats", counted)
    return seen


def head(hidden, seed, bias=True, vocab=VOCAB, frozen=False, dtype=torch.float32):
    """hidden states [N, H], weight and bias; leaves, of which a frozen head asks for no gradient."""
    g = generator_of(seed)
    made = [torch.randn(s, generator=g).to(dtype) for s in ((N, hidden), (vocab, hidden), (vocab,))]
    for x in made[: 1 if frozen else 3]:
        x.requires_grad_()
    return made if bias else [*made[:2], None]


def exact_logits(leaves, temperature, softcap, scale):
    hidden, weight, bias = leaves
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def doubles(leaves):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in leaves]


def both(call):
    """TRL's own answer, and ours."""
    theirs = call()
    with trl_kernels.patched():
        ours = call()
    return theirs, ours


def same(ours, theirs, exact, leaves, exact_leaves):
    """Values, kinds and gradients; exact has float64 values, or None where there is no gradient to compare."""
    assert len(ours) == len(theirs)
    for mine, their, true in zip(ours, theirs, exact, strict=True):
        assert (mine is None) == (their is None)
        if mine is None:
            continue
        assert mine.shape == their.shape and mine.dtype == their.dtype and mine.device == their.device
        assert mine.requires_grad == their.requires_grad
        if mine.dtype == torch.bool:
            assert torch.equal(mine, their)
            continue
        assert relative(mine, true) <= 1e-5 and relative(mine, their) <= 2e-5
        if not mine.requires_grad:
            continue
        g = torch.randn(mine.shape)
        grads = [
            torch.autograd.grad(
                x, [y for y in ls if y is not None and y.requires_grad], g.to(x.dtype), retain_graph=True
            )
            for x, ls in ((mine, leaves), (their, leaves), (true, exact_leaves))
        ]
        for a, b, t in zip(*grads, strict=True):
            assert a.dtype == b.dtype and relative(a, t) <= 2e-5 and relative(a, b) <= 5e-5


# ---- from hidden states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("outputs", [ALL, ("log_probs",), ("log_probs", "entropy", "is_top1"), ("mean_logits",)])
@pytest.mark.parametrize("name", HEADS)
def test_log_probs(name, outputs, frozen, count):
    temperature, softcap, scale, bias = HEADS[name]
    leaves, targets = head(HIDDEN, 1, bias, frozen=frozen), torch.randint(0, VOCAB, (N,))
    rest = (temperature, 24, softcap, scale, outputs)
    theirs, ours = both(lambda: ChunkedLogProbFunction.apply(*leaves, targets, *rest))
    assert len(count) == 1
    exact_leaves = doubles(leaves)
    z = exact_logits(exact_leaves, temperature, softcap, scale)
    logp = z.log_softmax(-1)
    entropy, collision = -(logp.exp() * logp).sum(-1), (2 * logp).logsumexp(-1)
    exact = logp[range(N), targets], entropy, collision, z.mean(-1), None
    same(ours, theirs, exact, leaves, exact_leaves)


def test_mean_logits_in_many_tiles(monkeypatch):
    """Of rows and of columns, neither of which divides."""
    monkeypatch.setattr(trl_kernels, "ROWS", 5)
    monkeypatch.setattr(trl_kernels, "COLUMNS", 8)
    leaves = head(HIDDEN, 2)
    for softcap in (None, 2.0):
        source = trl_kernels._hidden(*leaves, 0.7, softcap, 0.4)
        exact = exact_logits(doubles(leaves), 0.7, softcap, 0.4).mean(-1)
        assert relative(trl_kernels.mean_logits(source), exact) <= 1e-6
        rows = torch.tensor([12, 0, 3, 4, 7, 11, 2])
        with torch.autocast("cpu", torch.bfloat16):  # which is no business of sums in float32
            assert relative(trl_kernels.mean_logits(source, rows), exact[rows]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("beta", [0, 0.0, 0.3, 0.5, 1, 1.0])
@pytest.mark.parametrize("name", HEADS)
def test_divergence(name, beta, frozen, count):
    """Each side has its own softcap, scale and bias; the teacher would like a gradient and gets none."""
    temperature, *student_head, bias = HEADS[name]
    *teacher_head, other = HEADS["all" if name == "plain" else "plain"][1:]
    leaves, teacher = head(HIDDEN, 3, bias, frozen=frozen), head(WIDE, 4, other)
    options = (*student_head[::-1], *teacher_head[::-1])
    theirs, ours = both(lambda: ChunkedDivergenceFunction.apply(*leaves, *teacher, beta, temperature, *options))
    assert len(count) == 1
    exact_leaves = doubles(leaves)
    p = exact_logits(exact_leaves, temperature, *student_head).log_softmax(-1)
    q = exact_logits(doubles(teacher), temperature, *teacher_head).log_softmax(-1).detach()
    if beta in (0, 1):
        a, b = (q, p) if beta == 0 else (p, q)
        divergence = (a.exp() * (a - b)).sum(-1)
    else:
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        divergence = beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)
    same(ours, theirs, (divergence, -(p.exp() * p).sum(-1).detach()), leaves, exact_leaves)
    for out in (theirs, ours):
        given = [x for x in teacher if x is not None]
        assert torch.autograd.grad(out[0].sum(), given, allow_unused=True) == (None,) * len(given)


@pytest.mark.parametrize("beta", [1e-5, 1 - 1e-5])
def test_beta_next_to_its_ends(beta):
    """A mixture still, whose divergence is about 1e-5 and loses digits in float32, here as in TRL."""
    leaves, teacher = head(HIDDEN, 3), head(WIDE, 4)
    theirs, ours = both(lambda: ChunkedDivergenceFunction.apply(*leaves, *teacher, beta)[0])
    p, q = (exact_logits(doubles(x), 1.0, None, 1.0).log_softmax(-1) for x in (leaves, teacher))
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    exact = beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)
    assert relative(ours, exact) <= 1e-3 and relative(theirs, exact) <= 1e-3


def test_a_teacher_of_more_tokens_is_read_as_far_as_the_student_goes():
    leaves, teacher = head(HIDDEN, 5), head(WIDE, 6, vocab=VOCAB + 3)
    for beta in (0.0, 0.5):
        theirs, ours = both(lambda beta=beta: ChunkedDivergenceFunction.apply(*leaves, *teacher, beta))
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) <= 2e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_low_precision(autocast, softcap):
    """Dtypes are TRL's, and errors of the size of TRL's, beside one rounding of a gradient.

    Both round the same products to bfloat16, in tiles of other shapes: two draws of one error, so neither bounds the other
    closely.
    """
    dtype = torch.float32 if autocast else torch.bfloat16
    leaves, teacher, targets = head(HIDDEN, 7, dtype=dtype), head(WIDE, 8, dtype=dtype), torch.randint(0, VOCAB, (N,))

    def run(leaves=leaves, teacher=teacher):
        stats = ChunkedLogProbFunction.apply(*leaves, targets, 0.7, 24, softcap)[:4]
        outputs = [*stats, *ChunkedDivergenceFunction.apply(*leaves, *teacher, 0.3, 0.7, 1.0, softcap)]
        learns = [x for x in outputs if x.requires_grad]
        return outputs, [torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in learns]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, ours = both(run)
    exact = run(doubles(leaves), doubles(teacher))  # float32 inside, which is exact enough here
    for mine, their, true in zip(ours[0], theirs[0], exact[0], strict=True):
        assert mine.dtype == their.dtype == torch.float32
        assert relative(mine, true) <= 4 * relative(their, true) + 1e-5
    for mine, their, true in zip(ours[1], theirs[1], exact[1], strict=True):
        for x, y, t, leaf in zip(mine, their, true, leaves, strict=True):
            assert x.dtype == y.dtype == leaf.dtype
            assert relative(x, t) <= 4 * relative(y, t) + EPS[torch.bfloat16]


def test_no_row_keeps_the_graph():
    """An all-masked microbatch on a GPU gives zero gradients, not an error."""
    leaves, teacher = head(HIDDEN, 9), head(WIDE, 10)
    empty, other = leaves[0][:0], teacher[0][:0]
    with trl_kernels.patched():
        for softcap in (None, 2.0):
            out = ChunkedLogProbFunction.apply(
                empty, *leaves[1:], torch.zeros(0, dtype=torch.long), 1.0, 24, softcap, 1.0, ALL
            )
            assert [x.shape for x in out] == [(0,)] * 5
            assert not any(g.any() for g in torch.autograd.grad(out[0].sum() + out[1].sum(), leaves))
        divergence, entropy = ChunkedDivergenceFunction.apply(empty, *leaves[1:], other, *teacher[1:], 0.5)
        assert divergence.shape == entropy.shape == (0,)
        assert not any(g.any() for g in torch.autograd.grad(divergence.sum(), leaves))


# ---- from logits ---------------------------------------------------------------------------------------------------------


def calls():
    one, several = torch.randint(0, VOCAB, (3, 4)), torch.randint(0, VOCAB, (3, 4, 5))
    keep = torch.rand(3, 4) < 0.6
    return [
        ("selective_log_softmax", (one,), {}),
        ("selective_log_softmax", (several, 0.7), {}),
        ("selective_log_softmax", (one,), {"temperature": 0.7, "row_mask": keep}),
        ("selective_log_softmax", (several,), {"row_mask": keep.unsqueeze(-1).expand_as(several).long()}),
        ("selective_log_softmax_and_entropy", (one,), {}),
        ("selective_log_softmax_and_entropy", (one, False, 0.7), {"row_mask": keep}),
        ("selective_log_softmax_and_entropy", (one,), {"temperature": 1.4, "row_mask": keep.long()}),
        ("entropy_from_logits", (), {}),
        ("entropy_from_logits", (2,), {}),
        ("entropy_from_logits", (), {"chunk_size": 5}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_logits(dtype, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")  # which has float64
    z = torch.randn(3, 4, VOCAB, dtype=dtype).requires_grad_()
    z64 = z.detach().double().requires_grad_()
    for name, args, options in calls():
        theirs, ours = both(lambda name=name, a=args, o=options: getattr(utils, name)(z, *a, **o))
        exact = getattr(utils, name)(z64, *args, **options)
        if isinstance(exact, torch.Tensor):
            theirs, ours, exact = (theirs,), (ours,), (exact,)
        for a, b, t in zip(ours, theirs, exact, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype == dtype and a.requires_grad == b.requires_grad, name
            step = torch.finfo(dtype).eps
            assert relative(a, t) <= max(relative(b, t), 1.1 * step), name
            if not a.requires_grad:
                continue
            g = torch.randn(a.shape).to(dtype)
            grads = [
                torch.autograd.grad(x, y, g.to(x.dtype), retain_graph=True)[0] for x, y in ((a, z), (b, z), (t, z64))
            ]
            assert grads[0].dtype == dtype and relative(grads[0], grads[2]) <= max(
                relative(grads[1], grads[2]), 16 * step
            )


def test_the_kernel_of_that_name():
    """TRL's runs on a GPU alone, so here the truth is float64; its third argument is a temperature."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("trl.kernels")
    z = torch.randn(3, 4, VOCAB, dtype=torch.bfloat16).requires_grad_()
    one, keep = torch.randint(0, VOCAB, (3, 4)), torch.rand(3, 4) < 0.6
    exact = utils.selective_log_softmax_and_entropy(z.detach().double(), one, True, 0.7, keep)
    with trl_kernels.patched():
        ours = kernels.selective_log_softmax_and_entropy(z, one, 0.7, keep)
        assert utils._fused_logprob_entropy is kernels.selective_log_softmax_and_entropy
    for a, t in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32 and a.requires_grad and relative(a, t) <= 1e-6


# ---- what is patched, and what is left ------------------------------------------------------------------------------------


def test_nested_and_left_by_an_exception():
    theirs = names()
    with pytest.raises(KeyError), trl_kernels.patched():
        with trl_kernels.patched():
            inner = utils.selective_log_softmax
        assert utils.selective_log_softmax is inner is trl_kernels._selective_log_softmax
        assert set(names()) == set(theirs)  # the same names, in every module
        assert not set(names().values()) & set(theirs.values())
        raise KeyError
    assert names() == theirs


def test_by_hand():
    theirs = names()
    trl_kernels.patch()
    trl_kernels.patch()
    trl_kernels.unpatch()
    assert vars(ChunkedLogProbFunction)["apply"].__func__ is trl_kernels._chunked_log_probs
    trl_kernels.unpatch()
    assert names() == theirs
    with pytest.raises(RuntimeError, match="not patched"):
        trl_kernels.unpatch()


def test_an_apply_of_somebody_else_comes_back():
    other = staticmethod(lambda *_: "other")
    ChunkedDivergenceFunction.apply = other
    try:
        with trl_kernels.patched():
            assert vars(ChunkedDivergenceFunction)["apply"] is not other
        assert vars(ChunkedDivergenceFunction)["apply"] is other
    finally:
        del ChunkedDivergenceFunction.apply


@pytest.mark.filterwarnings("ignore:You are importing from")
@pytest.mark.parametrize("name", ["trl.experimental.sdpo.loss_utils", "somebody.elses"])
def test_modules_imported_inside(name, monkeypatch):
    """They take our functions, and TRL's once the block is left."""
    if name in sys.modules:
        monkeypatch.delitem(sys.modules, name)
    with trl_kernels.patched():
        if name.startswith("trl"):
            module = importlib.import_module(name)
        else:
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec("from trl.trainer.utils import selective_log_softmax", vars(module))
        assert module.selective_log_softmax is trl_kernels._selective_log_softmax
    assert module.selective_log_softmax is utils.selective_log_softmax
    assert utils.selective_log_softmax is not trl_kernels._selective_log_softmax


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0", "unknown"])
def test_another_version_is_refused(version, monkeypatch):
    before = names()
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"expected version 1\.16\.x, tested with 1\.16\.0, got {version}"):
        with trl_kernels.patched():
            pass
    assert names() == before


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="trl: is not installed"):
        trl_kernels.patch()


@pytest.mark.slow
def test_importing_it_does_not_import_trl():
    code = (
        "import sys, fused_losses.integrations.trl_kernels; print('trl' in sys.modules, 'transformers' in sys.modules)"
    )
    done = python("-c", code, cwd=None, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_cannot_be_done_is_refused(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")  # which looks at targets
    leaves, teacher, targets = head(HIDDEN, 11), head(WIDE, 12), torch.randint(0, VOCAB, (N,))
    sharded = leaves[1].detach().clone()
    sharded.ds_id = 3
    divergence = lambda *a: ChunkedDivergenceFunction.apply(*leaves, *teacher, *a)  # noqa: E731
    log_probs = lambda *a: ChunkedLogProbFunction.apply(*leaves, targets, *a)  # noqa: E731
    bad = [
        (lambda: divergence(1.5), ValueError, r"beta: expected a number in \[0, 1\], got 1.5"),
        (lambda: divergence(-0.1), ValueError, "beta: expected"),
        (lambda: divergence(0.5, 1.0, 0.0), ValueError, "scale: expected a finite number > 0"),
        (lambda: log_probs(1.0, 24, None, -2.0), ValueError, "scale: expected a finite number > 0"),
        (lambda: log_probs(0.0, 24), ValueError, "temperature: expected"),
        (lambda: log_probs(1.0, 24, 0.0), ValueError, "softcap: expected"),
        (lambda: ChunkedLogProbFunction.apply(leaves[0], sharded, None, targets, 1.0, 24), NotImplementedError, "ZeRO-3"),
        (lambda: ChunkedDivergenceFunction.apply(*teacher, leaves[0], sharded, None, 0.5), NotImplementedError, "ZeRO-3"),
        (lambda: ChunkedLogProbFunction.apply(*leaves, targets - VOCAB, 1.0, 24), ValueError, "label"),
        (lambda: ChunkedLogProbFunction.apply(*leaves, torch.full((N,), -100), 1.0, 24), ValueError, "got -100"),
        (lambda: ChunkedDivergenceFunction.apply(*teacher, *head(WIDE, 1, vocab=9), 0.5), ValueError, "vocabulary"),
    ]  # fmt: skip
    with trl_kernels.patched():
        for call, error, words in bad:
            with pytest.raises(error, match=words):
                call()


# ---- models and trainers -------------------------------------------------------------------------------------------------


def tiny(seed=1, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    seeded(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": 0.4}, {"final_logit_softcapping": 2.0, "tie_word_embeddings": True}]
)
@pytest.mark.parametrize("fp32", [False, True], ids=["", "fp32 head"])
def test_fused_lm_head(backend, options, fp32, count):
    """add_fused_lm_head, before the block or inside: loss, every field, and every parameter's gradient."""
    model = tiny(**options)
    ids = torch.randint(3, VOCAB, (3, 7))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.4, -100)
    utils.add_fused_lm_head(model, 0.8, cast_lm_head_to_fp32=fp32, outputs=("log_probs", *ALL))

    def run(model=model):
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss - 0.1 * out.entropy.sum()).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return out, grads

    (theirs, expected), (ours, found) = both(run)
    assert len(count) == 1 and theirs.keys() == ours.keys()
    for name in theirs:
        a, b = ours[name], theirs[name]
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad, name
        assert torch.equal(a, b) if a.dtype == torch.bool else relative(a, b) <= 1e-5, name
    for name, g in expected.items():
        assert relative(found[name], g) <= 5e-5, name
    with trl_kernels.patched():
        other = tiny(**options)
        utils.add_fused_lm_head(other, 0.8, cast_lm_head_to_fp32=fp32, outputs=("log_probs", *ALL))
    assert relative(run(other)[0].loss, theirs.loss) <= 1e-5  # TRL's again
    assert len(count) == 1


@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_of_the_distillation_trainer(beta, items, count):
    """Where a mask leaves tokens out, which on a CPU are projected all the same."""
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    mask = torch.arange(12).view(3, 4) % 3 != 0
    (x, *policy), (y, *teacher) = head(HIDDEN, 13), head(WIDE, 14)
    states = x[:12].view(3, 4, HIDDEN), y[:12].view(3, 4, WIDE)

    def run():
        found, entropy, n = loss(
            *states, policy[0], teacher[0], mask, beta, items, policy[1], teacher[1], 0.7, 0.9, 2.0, None, 0.8
        )
        return [found, entropy, n, *torch.autograd.grad(found, [x, *policy])]

    for a, b in zip(*both(run), strict=True):
        assert a.dtype == b.dtype and relative(a, b) <= 5e-5
    assert len(count) == 1


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def text(n, g):
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=g).tolist())


def trained(kind, tokenizer, path):
    """What a trainer of TRL logs in two steps, and the weights it ends with."""
    from datasets import Dataset

    g = generator_of(5)
    rows = [
        {
            "prompt": text(3, g) + " ",
            "completion": text(2 + i % 4, g),
            "chosen": text(3, g),
            "rejected": text(2 + i % 3, g),
        }
        for i in range(8)
    ]
    keep = ["prompt", "completion"] if kind == "SFT" else ["prompt", "chosen", "rejected"]
    data = Dataset.from_list([{k: r[k] for k in keep} for r in rows])
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(path),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
        bf16=False,
        seed=seed_of(1),
        disable_tqdm=True,
        gradient_checkpointing=False,
        **({"use_weighting": True} if kind == "DPO" else {}),
    )
    model = tiny()
    more = {"ref_model": tiny(2)} if kind == "DPO" else {}
    made = getattr(trl, f"{kind}Trainer")(model, args=config, train_dataset=data, processing_class=tokenizer, **more)
    made.train()
    logs = [
        {k: v for k, v in row.items() if not any(word in k for word in ("time", "second", "flos"))}
        for row in made.state.log_history
    ]
    return [row for row in logs if "loss" in row], copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_a_trainer(kind, tokenizer, tmp_path, count):
    (theirs, expected), (ours, found) = both(lambda: trained(kind, tokenizer, tmp_path))
    assert len(count) == (2 if kind == "SFT" else 4)  # two steps; DPO asks two models
    assert len(theirs) == len(ours) == 2 and theirs[0].keys() == ours[0].keys()
    for mine, their in zip(ours, theirs, strict=True):
        for name, value in their.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, value in expected.items():
        assert relative(found[name], value) <= 1e-3, name
