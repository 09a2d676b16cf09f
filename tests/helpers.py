"""What the tests share: errors against a float64 truth, gradients of named outputs, and the inputs."""

import torch

import fused_losses as fl

EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 2**-53}


def relative(x, truth):
    """||x - truth|| / ||truth||; plain error where the truth is zero."""
    x, truth = x.detach().double(), truth.detach().double()
    norm = truth.norm()
    return ((x - truth).norm() / (norm if norm > 0 else 1.0)).item()


def logits(shape, device, dtype=torch.float32, spread=1.0, scale=2.0):
    """Policy and reference logits, leaves that require grad. Rounded to dtype, so the float64 truth sees the same."""
    z = torch.randn(shape, device=device) * scale
    w = z + torch.randn(shape, device=device) * spread
    return z.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


def labels_for(shape, vocab, device, masked=True):
    y = torch.randint(0, vocab, shape, device=device)
    if masked and y.numel() > 2:
        y.view(-1)[1::3] = -100
    return y


def double(x):
    """The float64 leaf of the same numbers."""
    return x.detach().double().requires_grad_(x.requires_grad)


def gradients(output, leaves, weight):
    """Gradients of sum(weight * output), zeros where a leaf does not matter."""
    found = torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def outputs(stats):
    """The differentiable outputs of a TokenStats by name."""
    named = {"logps": stats.logps, "ref_logps": stats.ref_logps, "entropy": stats.entropy, "lse": stats.lse}
    return {k: v for k, v in (named | stats.divergence).items() if v is not None}


def compare(z, w, y, tolerance, wrap=fl.Logits, wrap_ref=None, **options):
    """Every output and both gradients of fl.token_stats against the float64 twin; tolerance(kind) bounds the error."""
    wrap_ref = wrap_ref or wrap
    ours = fl.token_stats(wrap(z), y, wrap_ref(w), **options)
    z64, w64 = double(z), double(w)
    truth = fl.reference.token_stats(wrap(z64), y, wrap_ref(w64), **options)
    assert torch.equal(ours.mask, truth.mask)
    for name, value in outputs(truth).items():
        mine = outputs(ours)[name]
        assert mine.shape == value.shape and mine.isfinite().all(), name
        assert relative(mine, value) <= tolerance("value"), f"{name}: {relative(mine, value):.1e}"
        weight = torch.randn(value.shape, device=value.device)
        theirs = gradients(value, (z64, w64), weight)
        for side, g, t in zip(("dz", "dw"), gradients(mine, (z, w), weight), theirs, strict=True):
            assert g.isfinite().all(), f"{name} {side}"
            assert relative(g, t) <= tolerance("gradient"), f"{name} {side}: {relative(g, t):.1e}"
    return ours, truth
