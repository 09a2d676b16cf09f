"""fl.topk: the ids and values of torch.sort of float64 logits, from every source and dtype, with ties, -inf and NaN."""

import math
from functools import partial

import pytest
import torch
from helpers import labels_for
from torch.library import opcheck

import fused_losses as fl
from fused_losses.backends import compiled, order
from fused_losses.cli.memory_probe import peak_bytes
from fused_losses.engine import topk as engine
from fused_losses.engine.hidden_ops import Options

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = 1 << 14  # a workspace of many tiles


def truth(z, k):
    """The largest of float64 logits, of equal ones the lowest id first."""
    ordered = z.double().sort(dim=-1, descending=True, stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]


def check(found, z, k, shown=lambda z: z):
    """The same ids, in the same order, and values of the transformed logits."""
    values, ids = truth(z, k)
    assert found.ids.dtype == torch.long and found.values.dtype == (
        torch.float64 if z.dtype == torch.float64 else torch.float32
    )
    assert torch.equal(found.ids.cpu(), ids.cpu())
    torch.testing.assert_close(
        found.values.double(), shown(values).to(found.values.device), rtol=1e-6, atol=1e-6, equal_nan=True
    )


def needs(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 logits")


def whole(*shape, most=3, dtype=torch.float32, device="cpu"):
    """Random integers: their products are exact in every dtype, and many are equal."""
    return torch.randint(-most, most + 1, shape, device=device).to(dtype)


@pytest.mark.parametrize("k", [1, 5, 16, 17, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(backend, device, dtype, k):
    """bf16 logits have ties in most rows, at the k-th place too."""
    needs(backend, dtype)
    z = torch.randn(2, 3, 1100, device=device).to(dtype)
    check(fl.topk(z, k), z, k)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 511, 512, 513, 1023, 1024, 9000])
def test_every_size_of_a_vocabulary(backend, device, vocab):
    z = whole(4, vocab, most=50, device=device)
    for k in sorted({1, min(7, vocab), min(vocab, 128)}):
        check(fl.topk(z, k), z, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_logits_the_lowest_id_comes_first(backend, device, dtype):
    needs(backend, dtype)
    z = torch.zeros(3, 2000, device=device, dtype=dtype)
    z[1] = -z[1]  # -0.0 equals 0.0
    z[1, 1::2] = 0.0
    z[2, 1999] = 1e-30 if dtype == torch.float32 else 1e-300
    found = fl.topk(z, 5)
    assert found.ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1999, 0, 1, 2, 3]]


@pytest.mark.parametrize("way", ["ascending", "descending"])
def test_sorted_rows(backend, device, way):
    """The most and the least that a search can find in each block."""
    z = torch.arange(3000.0, device=device)
    z = z if way == "ascending" else -z
    check(fl.topk(z, 20), z, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_suppressed_infinite_and_nan(backend, device, dtype):
    needs(backend, dtype)
    z = torch.randn(5, 1300, device=device).to(dtype)
    z[0, 3:] = -math.inf
    z[1] = -math.inf
    z[2, 1200], z[2, 700] = math.inf, math.inf
    z[3, 900], z[3, 17], z[3, 40] = math.nan, math.nan, math.inf
    z[4, 1250] = -math.nan
    found = fl.topk(z, 6)
    check(found, z, 6)
    assert found.ids[0, 3:].tolist() == [3, 4, 5] and found.ids[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.ids[2, :2].tolist() == [700, 1200] and found.ids[3, :3].tolist() == [17, 900, 40]
    assert found.ids[4, 0] == 1250
    p = fl.topk(z, 6, log_probs=True).values
    assert p[0, 3:].eq(-math.inf).all() and p[0, :3].exp().sum().sub(1).abs() < 1e-5
    assert p[1].isnan().all() and p[3].isnan().all() and p[4].isnan().all()


def test_options_of_the_head(backend, device):
    """They do not change the order, also where softcap makes all logits equal."""
    z = torch.randn(2, 3, 700, device=device)
    head = {"softcap": 3.0, "scale": 0.5, "temperature": 0.7}
    shown = lambda z: 3.0 * (z / 3.0).tanh() * 0.5 / 0.7  # noqa: E731
    check(fl.topk(fl.Logits(z, **head), 9), z, 9, shown)
    p = fl.topk(fl.Logits(z, **head), 9, log_probs=True)
    check(p, z, 9, lambda v: shown(v) - shown(z.double()).logsumexp(-1, keepdim=True))
    each = torch.tensor([0.5, 1.5], device=device)
    tempered = fl.Logits(z, softcap=3.0, temperature=each)
    shown = lambda v: 3.0 * (v / 3.0).tanh() / each[:, None, None]  # noqa: E731
    check(fl.topk(tempered, 9), z, 9, shown)
    p = fl.topk(tempered, 9, log_probs=True)
    check(p, z, 9, lambda v: shown(v) - shown(z.double()).logsumexp(-1, keepdim=True))
    large = whole(3, 700, most=500, device=device) + 1000
    found = fl.topk(fl.Logits(large, softcap=3.0), 9)
    check(found, large, 9, lambda z: 3.0 * (z / 3.0).tanh())
    assert found.values.unique().tolist() == [3.0]
    valid = z.clone()
    valid[..., 600:] = 100.0
    check(fl.topk(fl.Logits(valid, valid_vocab=600), 9), z[..., :600], 9)


@pytest.mark.parametrize(
    "rows",
    [
        lambda z: z.transpose(0, 1),
        lambda z: z[:, 1:, 1:],
        lambda z: z[::2, ::2, ::2],
        lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda z: z[0, 0],
        lambda z: z[:, :1].expand(-1, 4, -1),
        lambda z: z.reshape(2, 2, 2, 2, -1)[:, 1, :, 0, :],
        lambda z: z.reshape(2, 2, 2, 2, -1)[:, :, :, 1, :],
    ],
)
def test_strides(backend, device, rows):
    z = rows(torch.randn(4, 4, 601, device=device))
    check(fl.topk(z, 7), z, 7)


def head(dtype, device, vocab=1301):
    new = partial(whole, dtype=dtype, device=device)
    return new(2, 2, 16), new(vocab, 16), new(vocab), fl.Lora(new(3, 16), new(vocab, 3), 2.0)


@pytest.mark.parametrize("workspace", [None, SMALL])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states(backend, device, dtype, workspace):
    """Products of integers are exact, so that ties are, too."""
    needs(backend, dtype)
    x, w, bias, lora = head(dtype, device)
    z = x.double() @ w.double().T
    wide = z if dtype == torch.float64 else z.float()
    for k in (1, 128):
        check(fl.topk(fl.Hidden(x, w), k, workspace=workspace), wide, k)
    wide = wide + bias + 2.0 * (x.double() @ lora.a.double().T @ lora.b.double().T).to(wide.dtype)
    every = fl.Hidden(x, w, bias, lora=lora, softcap=30.0, scale=0.5, temperature=0.7, valid_vocab=1250)
    shown = lambda z: 30.0 * (z / 30.0).tanh() * (0.5 / 0.7)  # noqa: E731
    check(fl.topk(every, 12, workspace=workspace), wide[..., :1250], 12, shown)
    lse = shown(wide[..., :1250].double()).logsumexp(-1, keepdim=True)
    found = fl.topk(every, 12, log_probs=True, workspace=workspace)
    check(found, wide[..., :1250], 12, lambda z: shown(z) - lse)


def test_tiles_narrower_than_k(backend, device):
    x, w, *_ = head(torch.float32, device)
    check(fl.topk(fl.Hidden(x, w), 100, workspace=600), x @ w.T, 100)


def test_random_states_agree_with_the_other_functions(backend, device):
    x, w = torch.randn(2, 4, 12, device=device), torch.randn(900, 12, device=device)
    source, y = fl.Hidden(x, w, temperature=0.6), labels_for((2, 4), 900, device)
    found, logp = fl.topk(source, 8, workspace=SMALL), fl.topk(source, 8, log_probs=True, workspace=SMALL)
    assert torch.equal(found.ids, logp.ids)
    torch.testing.assert_close(found.values, fl.logits_at(source, found.ids), rtol=1e-5, atol=1e-5)
    y = y.where(y >= 0, 0)
    stats = fl.token_stats(source, y, shift=False)
    torch.testing.assert_close(logp.values, found.values - stats.lse.unsqueeze(-1), rtol=1e-5, atol=1e-5)
    best = fl.topk(source, 1)
    assert fl.token_stats(source, best.ids.squeeze(-1), shift=False).correct.all()


def test_the_values_with_a_gradient(own_backend, device):
    """The lines of the docstring."""
    x, w = (
        torch.randn(3, 4, 8, device=device, requires_grad=True),
        torch.randn(50, 8, device=device, requires_grad=True),
    )
    policy, labels = fl.Hidden(x, w), torch.zeros(3, 4, dtype=torch.long, device=device)
    found = fl.topk(policy, 5, log_probs=True)
    assert not found.values.requires_grad and not found.ids.requires_grad
    z = fl.logits_at(policy, found.ids)
    logp = z - fl.token_stats(policy, labels, shift=False).lse.unsqueeze(-1)
    torch.testing.assert_close(logp, found.values, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(logp.exp().square().sum(), (x, w))
    p = (x @ w.T).softmax(-1).topk(5).values
    for a, b in zip(mine, torch.autograd.grad(p.square().sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 3)])
def test_no_rows(backend, device, lead):
    w = torch.randn(20, 4, device=device)
    for source in (torch.randn(*lead, 20, device=device), fl.Hidden(torch.randn(*lead, 4, device=device), w)):
        for log_probs in (False, True):
            found = fl.topk(source, 3, log_probs=log_probs)
            assert found.values.shape == found.ids.shape == (*lead, 3)


@pytest.mark.skipif(compiled.COMPILER is None, reason="needs a C++ compiler")
def test_the_compiled_backend_has_the_same(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "compiled")
    z = torch.randn(4, 2000).bfloat16()
    check(fl.topk(z, 9), z, 9)
    x, w, *_ = head(torch.float32, "cpu")
    check(fl.topk(fl.Hidden(x, w), 9, workspace=SMALL), x @ w.T, 9)


def test_autocast_and_inference_mode(own_backend, device):
    x, w, *_ = head(torch.float32, device)
    x = x + 2.0**-12  # lost in bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = fl.topk(fl.Hidden(x, w), 6)
    check(found, x.bfloat16().float() @ w.T, 6)
    with torch.inference_mode():
        z = torch.randn(3, 200, device=device)
        check(fl.topk(z, 6), z, 6)


def test_groups_find_what_a_whole_search_finds():
    """With as few groups as they are used for; remaining columns have the largest."""
    for n, k in ((64 * 11 + 5, 5), (64 * 300, 100), (64 * 3 + 63, 1), (16 * 11 + 15, 5), (16 * 11 + 15, 6)):
        for most in (2, 1000):
            x = whole(6, n, most=most)
            x[0, -1] = x[1, 0] = most + 1
            assert torch.equal(order.top_positions(x, k), order.first_of_order(x, k))
            assert torch.equal(order.top_positions(x.double(), k), order.first_of_order(x, k))


def test_memory_from_hidden_states(own_backend, device):
    """Tiles and k numbers a row: an eighth of the logits."""
    x, w = torch.randn(512, 32, device=device), torch.randn(40_000, 32, device=device)
    whole_logits, workspace = 512 * 40_000 * 4, 4 << 20
    for log_probs in (False, True):
        beyond = peak_bytes(lambda p=log_probs: fl.topk(fl.Hidden(x, w), 20, log_probs=p, workspace=workspace))
        assert beyond < workspace + whole_logits / 8


def test_the_reference_is_the_same(own_backend, device):
    """It transforms all logits, and sorts those before the options of the head."""
    x, w, bias, lora = head(torch.float32, device)
    every = fl.Hidden(x, w, bias, lora=lora, softcap=30.0, temperature=0.7, valid_vocab=1250)
    for source in (every, fl.Logits(x @ w.T, scale=0.5)):
        for log_probs in (False, True):
            found, truth = (lib.topk(source, 9, log_probs=log_probs) for lib in (fl, fl.reference))
            assert torch.equal(found.ids, truth.ids) and type(found) is type(truth) is fl.TopK
            torch.testing.assert_close(found.values, truth.values, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="policy: fl.LogProbs has no logits"):
        fl.reference.topk(fl.LogProbs(bias), 2)


# ---- as torch sees it ------------------------------------------------------------------------------------------------


def test_compiled_callers(own_backend, device):
    """One graph, compiled once more for sizes that change, never again."""
    w = torch.randn(300, 8, device=device, requires_grad=True)

    def step(x, w):
        source = fl.Hidden(x, w, temperature=0.5)
        found = fl.topk(source, 4, log_probs=True)
        return found, fl.logits_at(source, found.ids).sum()

    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i, length in enumerate((4, 6, 9, 5)):
        x = torch.randn(2, length, 8, device=device, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            found, total = run(x, w)
        expected, whole_total = step(x, w)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.values, expected.values)
        torch.testing.assert_close(torch.autograd.grad(total, (x, w)), torch.autograd.grad(whole_total, (x, w)))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_opcheck(backend, device, kind):
    x = torch.randn(2, 3, 8, device=device)
    source = fl.Logits(x, softcap=2.0) if kind == "logits" else fl.Hidden(x, torch.randn(30, 8, device=device))
    options = engine._options(source, engine.shard_of(source), None)
    assert isinstance(options, Options)
    args = engine.TopArgs(engine._constants(source), None, options, 3, log_probs=True)
    opcheck(engine._topk, tuple(engine.ARGS.pack(args)))


def test_explained(own_backend, device):
    x, w = torch.randn(3, 8, device=device), torch.randn(100, 8, device=device)
    (step,) = fl.explain(fl.topk, fl.Hidden(x, w), 4).steps
    assert step.plan is not None and step.plan.kind == "vocab_chunks"
    (step,) = fl.explain(fl.topk, torch.randn(3, 40, device=device), 4).steps
    assert step.plan is None


# ---- bad input -------------------------------------------------------------------------------------------------------

Z = torch.randn(2, 3, 10)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fl.topk(Z, 11), ValueError, "k: expected at most the number of tokens, 10, got 11"),
        (lambda: fl.topk(fl.Logits(Z, valid_vocab=5), 6), ValueError, "the number of tokens, 5, got 6"),
        (lambda: fl.topk(torch.randn(2, 300), 129), ValueError, "k: expected an int from 1 to 128, got 129"),
        (lambda: fl.topk(Z, 0), ValueError, "k: expected an int from 1 to 128, got 0"),
        (lambda: fl.topk(Z, True), ValueError, "k: expected an int from 1 to 128, got True"),
        (lambda: fl.topk(Z, 2.0), ValueError, "k: expected an int from 1 to 128, got 2.0"),
        (lambda: fl.topk(fl.LogProbs(Z[..., 0]), 2), ValueError, "policy: fl.LogProbs has no logits"),
        (lambda: fl.topk(Z, 2, workspace=1 << 20), ValueError, "workspace: is for fl.Hidden sources"),
        (lambda: fl.topk(fl.Hidden(Z, torch.randn(20, 9)), 2), ValueError, "policy: expected hidden"),
        (lambda: fl.topk([1.0], 2), TypeError, "policy: expected a tensor of logits"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
