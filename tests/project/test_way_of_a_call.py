"""From a public function to the backend: few modules, and downwards only."""

import traceback
from pathlib import Path

import pytest
import torch

import fused_losses as fl
from fused_losses.backends import torch_backend

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = Path(fl.__file__).parent
Y = torch.randint(0, 50, (4, 6))
Z, W, X, A = torch.randn(4, 6, 50), torch.randn(4, 6, 50), torch.randn(4, 6, 8), torch.randn(50, 8)
LAYERS = ("losses", "engine", "backends")
SOURCES = {
    "logits": (Z, W, {}),
    "row_blocks": (fl.Hidden(X.requires_grad_(), A), fl.Hidden(X.detach(), A), {"plan": "row_blocks"}),
    "vocab_chunks": (fl.Hidden(X, A), fl.Hidden(X.detach(), A), {"plan": "vocab_chunks"}),
    "frozen_head": (fl.Hidden(X, A), fl.Hidden(X.detach(), A), {"plan": "frozen_head"}),
}


def modules_on_the_way(monkeypatch, call):
    """The modules on the stack when a backend gets its first tile, from the public function on, each once."""
    stacks = []

    def seen(run):
        def wrapper(*args, **options):
            stacks.append([Path(frame.filename) for frame in traceback.extract_stack()])
            return run(*args, **options)

        return wrapper

    for name in ("forward", "fold"):
        monkeypatch.setattr(torch_backend, name, seen(getattr(torch_backend, name)))
    call()
    inside = [path.relative_to(PACKAGE) for path in stacks[0] if path.is_relative_to(PACKAGE)]
    return list(dict.fromkeys(inside)), [path.parts[0] for path in inside]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "loss", [fl.dpo_loss, fl.tdpo_loss, fl.kto_loss, fl.distillation_loss], ids=lambda f: f.__name__
)
def test_few_modules_and_downwards(monkeypatch, loss, source):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    policy, ref, how = SOURCES[source]
    more = (torch.arange(4) % 2 == 0,) if loss is fl.kto_loss else ()
    modules, layers = modules_on_the_way(monkeypatch, lambda: loss(policy, Y, ref, *more, shift=True, **how))
    assert len(modules) <= 7, modules  # and core/batch.py, which reads the labels, beside them
    assert layers == sorted(layers, key=LAYERS.index), layers
