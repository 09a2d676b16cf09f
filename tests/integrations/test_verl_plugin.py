"""verl's fused log-probs, top-k distillation and policy losses on our operators.

Every test runs with functions of verl's signatures that stand here, and with verl itself where it is importable (its
dependencies, ray and hydra among them, are not installed for the tests).
"""

import importlib
import importlib.metadata
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import relative
from ranks import on_ranks
from torch.autograd.profiler import profile

import fused_losses as fl
from fused_losses.integrations import verl as plugin

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
B, T, H, V, K = 2, 5, 8, 37, 4
PPO = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
DISTILLATION = "verl.trainer.distillation.fsdp.losses"
ALGORITHMS = "verl.trainer.ppo.core_algos"
ULYSSES = "verl.utils.ulysses"


def exact(hidden, weight, ids, temperature=1.0):
    """Log-probs and entropy, in the dtype of the states."""
    logps = (hidden @ weight.T / temperature).log_softmax(-1)
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


class FusedLinearForPPOFunction(torch.autograd.Function):
    """That of verl 0.9.1: the whole of it in one chunk."""

    @staticmethod
    def forward(ctx, hidden_states, vocab_weights, input_ids, temperature=1.0, chunk_size=512):
        ctx.save_for_backward(hidden_states, vocab_weights, input_ids)
        ctx.temperature = temperature
        logps, entropy = exact(hidden_states, vocab_weights, input_ids, temperature)
        return logps.float(), entropy

    @staticmethod
    def backward(ctx, dlog_probs, dentropy):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors[:2]]
        with torch.enable_grad():
            outputs = exact(*leaves, ctx.saved_tensors[2], ctx.temperature)
        grads = torch.autograd.grad(outputs, leaves, [dlog_probs.to(outputs[0].dtype), dentropy])
        return (*grads, None, None, None)


class FusedLinearForPPO(torch.nn.Module):
    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        apply = sys.modules[PPO].FusedLinearForPPOFunction.apply
        return apply(hidden_states, vocab_weights, input_ids.long(), temperature, self.chunk_size)


def compute_forward_kl_topk(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format):
    logq, ids = (x.values().unsqueeze(0) for x in (teacher_topk_log_probs, teacher_topk_ids))
    full, clamp = student_logits.log_softmax(-1), config.distillation_loss.log_prob_min_clamp
    own, logp = full.topk(ids.shape[-1]).indices, full.gather(-1, ids)
    masses = logp.exp().sum(-1), logq.exp().sum(-1)
    if clamp is not None:
        logp, logq = logp.clamp_min(clamp), logq.clamp_min(clamp)
    common = (ids.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    each = logq.float().exp() * (logq.float() - logp.float())
    count = common.sum(-1)
    advantage = (-each * common).sum(-1) / count.clamp_min(1)
    names = ("distillation_losses", "student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage")
    return dict(zip(names, (each.sum(-1), *masses, count, advantage), strict=True))


def stand_ins():
    made = {name: ModuleType(name) for name in ("verl", PPO, KERNEL, DISTILLATION, ALGORITHMS, ULYSSES)}
    made["verl"].__version__ = plugin.TESTED
    made[PPO].FusedLinearForPPOFunction, made[PPO].FusedLinearForPPO = FusedLinearForPPOFunction, FusedLinearForPPO
    made[KERNEL].linear_cross_entropy = FusedLinearForPPOFunction.apply  # theirs needs a GPU; its name alone is read
    made[DISTILLATION].compute_forward_kl_topk = compute_forward_kl_topk
    registry = made[ALGORITHMS].POLICY_LOSS_REGISTRY = {"vanilla": object()}
    made[ALGORITHMS].register_policy_loss = lambda name: lambda f: registry.setdefault(name, f)
    made[ULYSSES].get_ulysses_sequence_parallel_world_size = lambda: 1
    return made


def verl_itself():
    return pytest.importorskip("verl", reason="verl is not importable: its functions have stand-ins")


@pytest.fixture(params=["stand-in", "verl"])
def verl(request, monkeypatch):
    """The modules of verl that are patched; afterwards they are what they were."""
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    if request.param == "verl":
        verl_itself()
    else:
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
    names = {"ppo": PPO, "kernel": KERNEL, "distillation": DISTILLATION, "algorithms": ALGORITHMS}
    found = SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
    before = state(found)
    yield found
    assert state(found) == before and plugin._PATCH.depth == 0


def state(verl):
    registry = verl.algorithms.POLICY_LOSS_REGISTRY
    function = verl.ppo.FusedLinearForPPOFunction
    patched = vars(function).get("apply")
    return patched, verl.kernel.linear_cross_entropy, verl.distillation.compute_forward_kl_topk, dict(registry)


def numbers(dtype, *shape):
    leaves = [torch.randn(*shape, H, dtype=dtype).requires_grad_(), torch.randn(V, H, dtype=dtype).requires_grad_()]
    return leaves, torch.randint(V, shape)


def compare(mine, theirs, leaves, bound=1e-5):
    """Values, dtypes and shapes, and the gradients of a random combination of the outputs."""
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and relative(a, b) <= bound
    factors = [torch.randn_like(x) for x in mine]
    found, truth = (
        torch.autograd.grad(sum((x * f.to(x)).sum() for x, f in zip(outputs, factors, strict=True)), leaves)
        for outputs in (mine, theirs)
    )
    assert all(relative(a, b) <= bound for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("shape", [(T,), (B, T)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_and_entropy_are_verls(verl, dtype, shape):
    leaves, ids = numbers(dtype, *shape)
    head = verl.ppo.FusedLinearForPPO()
    theirs = head(*leaves, ids, temperature=0.7)
    with plugin.patched():
        assert verl.ppo.FusedLinearForPPOFunction.apply is plugin._for_ppo
        mine = head(*leaves, ids, temperature=0.7)
        part = head(*leaves, ids.int(), temperature=0.7)[0]
    assert [x.dtype for x in mine] == [x.dtype for x in theirs] == [torch.float32, dtype]
    assert torch.equal(part, mine[0])
    compare(mine, theirs, leaves, 1e-6 if dtype == torch.float64 else 1e-5)


def largest(run):
    """The bytes of the largest allocation during run()."""
    with profile(profile_memory=True) as recorded:
        run()
    return max(event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]")


def test_no_tensor_of_vocabulary_size(verl, monkeypatch):
    """Forward and backward, against verl's, which has logits of a whole chunk."""
    rows, vocab, workspace = 256, 512, 65536
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE", str(workspace))
    x, weight = torch.randn(rows, H).requires_grad_(), torch.randn(vocab, H).requires_grad_()
    ids = torch.randint(vocab, (rows,))

    def step():
        logps, entropy = verl.ppo.FusedLinearForPPO(chunk_size=rows)(x, weight, ids)
        (logps.sum() + entropy.sum()).backward()

    theirs = largest(step)
    with plugin.patched():
        mine = largest(step)
    assert mine <= workspace < theirs and theirs >= 4 * rows * vocab


@pytest.mark.parametrize("shape", [(B,), (B, T), (1, T), (T,)])
def test_a_temperature_for_each_token_or_sample(verl, shape):
    """One per sample [B]; one per token [B, T], packed [1, T], and as verl's engine makes it for packed states, [T]."""
    leaves, ids = numbers(torch.float64, *((B, T) if shape[0] == B else (1, T)))
    temperature = torch.rand(shape).double() + 0.5
    each = temperature.view(B, 1) if shape == (B,) else temperature
    truth = exact(*leaves, ids, each.unsqueeze(-1))
    with plugin.patched():
        compare(verl.ppo.FusedLinearForPPO()(*leaves, ids, temperature), truth, leaves, 1e-6)
        flat = [x.flatten() for x in exact(*leaves, ids, each.unsqueeze(-1))]
        compare(verl.kernel.linear_cross_entropy(*leaves, ids, temperature), flat, leaves, 1e-6)


def test_a_temperature_of_a_wrong_shape_is_refused(verl):
    leaves, ids = numbers(torch.float32, B, T)
    with plugin.patched(), pytest.raises(ValueError, match="temperature: expected a number or a float tensor"):
        verl.ppo.FusedLinearForPPO()(*leaves, ids, torch.ones(T))


@pytest.mark.parametrize("reduction", ["none", "sum", "Mean"])
def test_linear_cross_entropy(verl, reduction):
    """verl's own runs on a GPU alone: against the formula."""
    leaves, ids = numbers(torch.float64, B, T)
    logps, entropy = (x.flatten() for x in exact(*leaves, ids, 1.3))
    with plugin.patched():
        mine = verl.kernel.linear_cross_entropy(*leaves, ids, 1.3, reduction)
        with pytest.raises(ValueError, match="reduction: expected"):
            verl.kernel.linear_cross_entropy(*leaves, ids, 1.3, "max")
    assert {x.dtype for x in mine} == {torch.float32}
    compare(mine, ({"none": logps, "sum": logps.sum(), "Mean": logps.mean()}[reduction], entropy), leaves, 1e-6)


def check_split(rank, group):
    """Each rank has half of the head. The gradient of the states is what a sum over the ranks makes whole."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(T, 1, H, generator=g).double(), torch.randn(V - 1, H, generator=g).double()
    ids, temperature = torch.randint(V - 1, (1, T), generator=g), 0.8
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    truth = exact(hidden[:, 0], weight, ids[0], temperature)
    d_hidden, d_weight = torch.autograd.grad(truth[0].sum() - 0.3 * truth[1].sum(), leaves)
    rows = slice(rank * (V - 1) // 2, (rank + 1) * (V - 1) // 2)
    own = [hidden.detach().requires_grad_(), weight.detach()[rows].requires_grad_()]
    mine = plugin._linear_cross_entropy(*own, ids, temperature, "none", group)
    found = torch.autograd.grad(mine[0].sum() - 0.3 * mine[1].sum(), own)
    dist.all_reduce(found[0], group=group)
    for a, b in zip((*mine, *found), (*truth, d_hidden, d_weight[rows]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_head_split_over_ranks(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    on_ranks(2, check_split)


def nested(x):
    """[1, T, ...] as two sequences, as verl packs them."""
    return torch.nested.nested_tensor_from_jagged(x[0], torch.tensor([0, 2, T]))


def teacher(dtype):
    best = torch.randn(1, T, V).log_softmax(-1).topk(K)
    return best.values.to(dtype), best.indices


def config_of(clamp, **more):
    return SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=clamp, **more))


@pytest.mark.parametrize("clamp", [None, -3.0])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_distillation_is_verls(verl, dtype, chunked, clamp):
    logits, (logq, ids) = torch.randn(1, T, V, dtype=dtype).requires_grad_(), teacher(dtype)
    ids[0, 0] = logits[0, 0].topk(K).indices  # some overlap
    args = (logits, nested(logq), nested(ids), config_of(clamp, use_chunked_topk=chunked, chunked_topk_chunk_size=2))
    theirs = verl.distillation.compute_forward_kl_topk(*args, "thd")
    with plugin.patched():
        mine = verl.distillation.compute_forward_kl_topk(*args, "thd")
        with pytest.raises(ValueError, match="expected nested tensors"):
            verl.distillation.compute_forward_kl_topk(logits, logq, ids, args[-1], "thd")
    assert mine.keys() == theirs.keys() and torch.equal(mine["overlap_count"], theirs["overlap_count"])
    assert mine["overlap_count"].max() == K
    for key, x in mine.items():
        assert x.shape == (1, T) and x.requires_grad == (key == "distillation_losses")
        torch.testing.assert_close(x.double(), theirs[key].detach().double(), rtol=1e-5, atol=1e-6)
    compare([mine["distillation_losses"]], [theirs["distillation_losses"]], [logits])


def test_topk_distillation_from_hidden_states():
    """The same numbers and the gradients of states and head, without logits."""
    leaves, _ = numbers(torch.float64, 1, T)
    logq, ids = teacher(torch.float64)
    mine = plugin.forward_kl_topk(fl.Hidden(*leaves), logq, ids)
    theirs = plugin.forward_kl_topk(leaves[0] @ leaves[1].T, logq, ids)
    compare([mine["distillation_losses"]], [theirs["distillation_losses"]], leaves, 1e-9)
    overlap = fl.topk_overlap(fl.Hidden(*leaves), torch.zeros(1, T).long(), logq, ids, shift=False)
    assert torch.equal(mine["overlap_count"], overlap.overlap)
    assert relative(mine["student_mass"], overlap.student_mass) <= 1e-9


def by_hand_vespo(old, logps, advantages, mask):
    """[B, T]: the sequence's ratio W, and W^k e^(lambda (1 - W)) with the constants of the paper's code."""
    w = ((logps - old).detach() * mask).sum(-1, keepdim=True).exp()
    k, lam = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
    return -(w**k * (lam * (1 - w)).exp()) * advantages * logps * mask


@pytest.mark.parametrize("ranks", [1, 4])
def test_vespo_is_in_the_registry(verl, ranks):
    old, logps = -torch.rand(B, T).double(), (-torch.rand(B, T).double()).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    advantages, weights = torch.tensor([[1.5], [-0.7]]).double().expand(B, T), torch.rand(B, T).double()
    config = SimpleNamespace(global_batch_info={"dp_size": ranks, "batch_num_tokens": 40 if ranks > 1 else None})
    with plugin.patched():
        loss = verl.algorithms.POLICY_LOSS_REGISTRY["fl_vespo"]
        value, metrics = loss(old, logps, advantages, mask, "token-mean", config, weights)
        with pytest.raises(ValueError, match="loss_agg_mode of fl_vespo: expected"):
            loss(old, logps, advantages, mask, "seq-mean-token-mean")
        with pytest.raises(ValueError, match="batch_num_tokens: expected a number"):
            loss(old, logps, advantages, mask, config=SimpleNamespace(global_batch_info={"dp_size": 2}))
    each = by_hand_vespo(old, logps, advantages, mask) * weights
    compare([value], [each.sum() / (40 if ranks > 1 else mask.sum()) * ranks], [logps], 1e-6)
    assert metrics.keys() == {"actor/ppo_kl", "actor/vespo/phi_seq_mean"}
    assert math.isclose(metrics["actor/ppo_kl"], ((old - logps) * mask).sum() / mask.sum(), rel_tol=1e-6)


def test_nested_blocks_and_errors_give_verl_back(verl):
    before = state(verl)
    with plugin.patched(), plugin.patched():
        pass
    assert state(verl) == before
    with pytest.raises(KeyError), plugin.patched():
        raise KeyError
    with pytest.raises(RuntimeError, match="verl is not patched"):
        plugin.unpatch()


@pytest.mark.parametrize("value", [None, "0"])
def test_the_plugin_does_nothing_unless_it_is_asked_to(verl, monkeypatch, value):
    before = state(verl)
    if value is not None:
        monkeypatch.setenv(plugin.SWITCH, value)
    plugin.plugin()
    assert state(verl) == before


def test_the_plugin_patches_and_refuses_in_words(verl, monkeypatch, caplog):
    monkeypatch.setenv(plugin.SWITCH, "1")
    plugin.plugin()
    assert verl.kernel.linear_cross_entropy is plugin._linear_cross_entropy
    plugin.unpatch()
    monkeypatch.setattr(sys.modules["verl"], "__version__", "0.10.0")
    with pytest.raises(ImportError, match=r"verl: expected version 0.9.x, tested with 0.9.1, got 0.10.0"):
        plugin.plugin()
    monkeypatch.setenv(plugin.SWITCH, "yes")
    with pytest.raises(ValueError, match="FUSED_LOSSES_VERL: expected 0 or 1, got 'yes'"):
        plugin.plugin()
    assert "runs on its own kernels" in caplog.text  # verl itself keeps silent about plugins that fail


@pytest.fixture
def metadata(tmp_path):
    """The folder with what an installation of this tree would leave for importlib.metadata."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return tmp_path


def test_the_plugin_is_found(metadata):
    (found,) = importlib.metadata.distributions(name="fused_losses", path=[str(metadata)])
    (entry,) = [x for x in found.entry_points if x.group == "verl.plugins"]
    assert entry.name == "fused_losses" and entry.load() is plugin.plugin


@pytest.mark.parametrize("value", ["0", "1"])
def test_verl_loads_the_plugin(metadata, value):
    verl_itself()
    code = f"import verl, {KERNEL} as kernel; print(kernel.linear_cross_entropy.__module__)"
    path = os.pathsep.join([str(metadata), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, plugin.SWITCH: value, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout.split()[-1] == plugin.__name__) == (value == "1")


def test_a_model_with_verls_forward(monkeypatch):
    """A tiny Llama as verl patches it: impl_backend torch on verl's function and ours, and triton, which then needs no GPU."""
    verl_itself()
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    sizes = {"hidden_size": H, "intermediate_size": H, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    ids, shifted = torch.randint(V, (1, T)), torch.randint(V, (1, T))

    def step(backend, temperature):
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        model.zero_grad()
        out = model(input_ids=ids, shift_labels=shifted, temperature=temperature, return_dict=True)
        (out.log_probs.sum() - 0.3 * out.entropy.sum()).backward()
        return [out.log_probs.flatten(), out.entropy.flatten(), *(p.grad.clone() for p in model.parameters())]

    theirs = step("torch", 0.7)
    with plugin.patched():
        for backend in ("torch", "triton"):
            for temperature in (0.7, torch.full((T,), 0.7)):
                torch.testing.assert_close(step(backend, temperature), theirs, rtol=1e-4, atol=1e-5)
        mixed = step("torch", torch.tensor([0.7, 2.0, 0.7, 2.0, 2.0]))
    at_two = step("torch", 2.0)
    for mine, at_07, at_2 in zip(mixed[:2], theirs, at_two, strict=False):
        torch.testing.assert_close(
            mine, torch.stack([at_07[0], at_2[1], at_07[2], at_2[3], at_2[4]]), rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(at_07, at_2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FusedLinearForPPO.forward", "FusedLinearForPPOFunction.forward"])
def test_the_stand_ins_have_verls_signatures(name):
    verl_itself()
    cls, method = name.split(".")
    theirs = getattr(getattr(importlib.import_module(PPO), cls), method)
    assert list(inspect.signature(theirs).parameters) == list(
        inspect.signature(getattr(globals()[cls], method)).parameters
    )


def test_our_functions_have_verls_signatures():
    verl_itself()

    def names(f, skip=0):
        return list(inspect.signature(f).parameters)[skip:]

    modules = [importlib.import_module(name) for name in (PPO, KERNEL, DISTILLATION, ALGORITHMS)]
    ppo, kernel, distillation, algorithms = modules
    assert names(plugin._for_ppo) == names(ppo.FusedLinearForPPOFunction.forward, 1)
    assert names(plugin._linear_cross_entropy) == names(kernel.LinearCrossEntropy.forward, 1)
    assert names(plugin._compute_forward_kl_topk) == names(distillation.compute_forward_kl_topk)
    assert names(plugin.vespo) == names(algorithms.POLICY_LOSS_REGISTRY["vanilla"])
