"""OpenRLHF's log-probs and entropies on our operators: on functions of the same names and formulas in every run, and in the
package's Actor where it is there (deepspeed and flash-attn may be missing)."""

import contextlib
import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from stand_ins_of_packages import adapter, module, real
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

NAME, V = "openrlhf", 40
STUBS = "deepspeed", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"


def log_probs_from_logits(logits, labels, temperature=1.0):
    """As in OpenRLHF 0.11.2, without flash-attn."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def compute_entropy(logits):
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def stand_ins(version="0.11.2"):
    functions = {"log_probs_from_logits": log_probs_from_logits, "compute_entropy": compute_entropy}
    parts = [module(f"openrlhf.models.{name}", **functions) for name in ("utils", "actor")]
    return module("openrlhf", __version__=version, __path__=[]), *parts


@contextlib.contextmanager
def imported():
    """The package, with stubs for what it imports and a CPU may not have, and its entropy not compiled."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name in STUBS:
            if find_spec(name.split(".")[0]) is None or isinstance(sys.modules.get(name.split(".")[0]), MagicMock):
                patch.setitem(sys.modules, name, MagicMock(__spec__=ModuleSpec(name, None)))
        patch.setattr(torch, "compile", lambda f: f)
        try:
            real("openrlhf")
            real("openrlhf.models.actor")
            patch.undo()
            yield
        finally:
            for name in set(sys.modules) - before:
                if name.split(".")[0] == "openrlhf":
                    del sys.modules[name]


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


@pytest.fixture(params=["stand-in", "package"])
def theirs(request):
    """Our module beside their two. These are what they were at the end."""
    with contextlib.ExitStack() as stack:
        if request.param == "package":
            stack.enter_context(imported())
            ours = importlib.import_module(f"fused_losses.integrations.{NAME}")
        else:
            ours = stack.enter_context(adapter(NAME, *stand_ins()))
        modules = {name: importlib.import_module(f"openrlhf.models.{name}") for name in ("utils", "actor")}
        before = {name: dict(vars(x)) for name, x in modules.items()}
        yield SimpleNamespace(ours=ours, **modules)
        for name, x in modules.items():
            assert all(vars(x)[key] is value for key, value in before[name].items()), name


def on_both(theirs, call):
    found = [call()]
    with theirs.ours.patched():
        assert theirs.actor.compute_entropy is not compute_entropy
        assert theirs.actor.log_probs_from_logits.__module__ == theirs.ours.__name__
        found.append(call())
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_functions(theirs, temperature, dtype):
    leaf, labels = torch.randn(2, 6, V, dtype=dtype).requires_grad_(), torch.randint(V, (2, 6))

    def call():
        logps = theirs.actor.log_probs_from_logits(leaf * 1.0, labels, temperature)
        entropy = theirs.actor.compute_entropy(leaf)
        total = (logps * torch.arange(6)).sum() + (entropy * torch.linspace(0, 1, 6)).sum()
        return logps, entropy, *torch.autograd.grad(total, leaf)

    on_both(theirs, call)


def test_logits_stay_as_they_are(theirs):
    logits = torch.randn(2, 6, V)
    before = logits.clone()
    with theirs.ours.patched():
        theirs.utils.log_probs_from_logits(logits, torch.randint(V, (2, 6)), temperature=0.5)
    assert torch.equal(logits, before)


class Table(nn.Module):
    """A model whose logits are rows of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, **_):
        outputs = importlib.import_module("transformers.modeling_outputs")
        return outputs.CausalLMOutputWithPast(logits=self.table[input_ids] * 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor(theirs, temperature):
    """Actor.forward, as PPO calls it: action log-probs, entropies, and the gradient of both."""
    if not hasattr(theirs.actor, "Actor"):
        pytest.skip("needs the Actor of the package")
    actor = theirs.actor.Actor(Table(torch.randn(V, V)), temperature=temperature)
    actor.packing_samples = False
    ids = torch.randint(V, (2, 7))
    options = {"attention_mask": torch.ones_like(ids), "return_output": True, "return_entropy": True}

    def call():
        logps, output = actor(ids, torch.ones(2, 4, dtype=torch.long), **options)
        total = (logps * torch.arange(4)).sum() + output.entropy.sum()
        return logps, output.entropy, *torch.autograd.grad(total, actor.model.table)

    on_both(theirs, call)


def test_words(theirs):
    with theirs.ours.patched(), pytest.raises(ValueError, match="index: expected"):
        theirs.utils.log_probs_from_logits(torch.randn(2, 6, V), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(RuntimeError, match="unpatch: openrlhf is not patched"):
        theirs.ours.unpatch()


def test_another_version():
    with adapter(NAME, *stand_ins("0.12.0")) as ours, pytest.raises(ImportError, match=r"0\.11\.x, .* got 0\.12\.0"):
        ours.patch()
