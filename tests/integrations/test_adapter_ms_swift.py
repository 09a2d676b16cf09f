"""ms-swift's losses on our operators: on functions of the same names and formulas in every run, and on the package where it is
there."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from helpers import relative
from stand_ins_of_packages import adapter, module, real
from torch.nn.functional import cross_entropy, log_softmax, pad

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "ms_swift"
NAMES = ("loss.base", "loss.mapping", "trainers.utils", "rlhf_trainers.rlhf_mixin", "rlhf_trainers.gkd_loss")
B, T, V = 2, 6, 40


class BaseLoss:
    """As in ms-swift 4.6.0."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


def per_token_loss_func(outputs, labels, enable_dft_loss=False, **kwargs):
    losses = cross_entropy(outputs.logits.float().flatten(0, 1), labels.roll(-1, -1).flatten(), reduction="none")
    return losses * losses.neg().exp().detach() if enable_dft_loss else losses


def selective_log_softmax(logits, index):
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def default_log_softmax(logits):
    return log_softmax(logits, -1)


def default_kl_div(input_log_probs, target_log_probs):
    return (target_log_probs.exp() * (target_log_probs - input_log_probs)).sum(-1)


def jsd_loss(s_logits, t_logits, beta, log_softmax_fn=default_log_softmax, kl_div_fn=default_kl_div, chunk_size=512):
    s, t = log_softmax_fn(s_logits), log_softmax_fn(t_logits)
    if beta in (0, 1):
        return (kl_div_fn(t, s) if beta else kl_div_fn(s, t)).sum()
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    return (beta * kl_div_fn(m, t) + (1 - beta) * kl_div_fn(m, s)).sum()


def stand_ins():
    members = (
        {"BaseLoss": BaseLoss},
        {"loss_map": {"cross_entropy": BaseLoss}},
        {"per_token_loss_func": per_token_loss_func},
        {"selective_log_softmax": selective_log_softmax},
        {"jsd_loss": jsd_loss, "default_log_softmax": default_log_softmax, "default_kl_div": default_kl_div},
    )
    made = [module("swift." + name, **x) for name, x in zip(NAMES, members, strict=True)]
    return module("swift", __version__="4.6.0", __path__=[]), *made


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")


@pytest.fixture(params=["stand-in", "package"])
def swift(request):
    """Our module, and theirs by the last parts of their names. They are what they were at the end."""
    with contextlib.ExitStack() as stack:
        if request.param == "package":
            for name in NAMES:
                real("swift." + name)
            ours = importlib.import_module(f"fused_losses.integrations.{NAME}")
        else:
            ours = stack.enter_context(adapter(NAME, *stand_ins()))
        theirs = {name.split(".")[1]: importlib.import_module("swift." + name) for name in NAMES}
        before = {name: dict(vars(x)) for name, x in theirs.items()}
        losses = dict(theirs["mapping"].loss_map)
        yield SimpleNamespace(ours=ours, **theirs)
        theirs["mapping"].loss_map.clear()
        theirs["mapping"].loss_map.update(losses)
        for name, x in theirs.items():
            assert all(vars(x)[key] is value for key, value in before[name].items()), name


def numbers(dtype=torch.float32):
    labels = torch.randint(V, (B, T))
    labels[:, :2] = -100
    return SimpleNamespace(logits=torch.randn(B, T, V, dtype=dtype).requires_grad_()), labels


def exchanged(swift):
    return swift.utils.per_token_loss_func, swift.rlhf_mixin.selective_log_softmax, swift.gkd_loss.jsd_loss


def both(swift, call):
    """What a call returns on theirs and on ours, with its gradients."""
    theirs = call()
    with swift.ours.patched():
        assert all(f.__module__ == swift.ours.__name__ for f in exchanged(swift))
        ours = call()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dft", [False, True])
def test_token_losses(swift, dft):
    outputs, labels = numbers()

    def call():
        losses = swift.utils.per_token_loss_func(outputs, labels, enable_dft_loss=dft)
        return losses, *torch.autograd.grad((losses * torch.arange(B * T)).sum(), outputs.logits)

    both(swift, call)


def test_log_probs_of_dpo_and_kto(swift):
    """With the assignment in place that follows it there."""
    outputs, labels = numbers()

    def call():
        if hasattr(swift.rlhf_mixin, "RLHFTrainerMixin"):
            trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1))
            logps, means, mask = swift.rlhf_mixin.RLHFTrainerMixin.get_per_token_logps(trainer, outputs.logits, labels)
            assert torch.equal(mask, labels != -100) and means.shape == labels.shape
        else:
            logps = swift.rlhf_mixin.selective_log_softmax(outputs.logits, labels.clamp(min=0))
            logps[labels == -100] = 0
        return logps, *torch.autograd.grad((logps * torch.arange(T)).sum(), outputs.logits)

    both(swift, call)


@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_jsd(swift, beta, rows):
    """Of both sides: where the vocabularies differ, the padding of the teacher is the student's."""
    leaves = torch.randn(rows, V).requires_grad_(), torch.randn(rows, V).requires_grad_()

    def call():
        total = swift.gkd_loss.jsd_loss(*leaves, beta)
        return total, *torch.autograd.grad(total, leaves, materialize_grads=True)

    both(swift, call)


def test_a_split_vocabulary_remains_theirs(swift):
    calls, s = [], torch.randn(4, V)

    def counting(logits):
        calls.append(len(logits))
        return logits.log_softmax(-1)

    with swift.ours.patched():
        found = swift.gkd_loss.jsd_loss(s, -s, 0.5, log_softmax_fn=counting)
    assert calls == [4, 4] and found > 0


def trainer(parts=1):
    return SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=parts))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["fused_cross_entropy", "fused_dft"])
@pytest.mark.parametrize("count", [None, 21])
def test_loss_types(swift, name, scaled, count):
    swift.ours.register()
    outputs, labels = numbers()
    scale = torch.rand(B * T) if scaled else None
    loss = swift.mapping.loss_map[name](None, trainer())
    found = loss(outputs, labels, num_items_in_batch=count, loss_scale=scale, trainer=None)
    each = cross_entropy(outputs.logits.double().flatten(0, 1), labels.roll(-1, -1).flatten(), reduction="none")
    each = each * each.neg().exp().detach() if name == "fused_dft" else each
    truth = (each if scale is None else each * scale).sum() / (count or (labels[:, 1:] != -100).sum())
    assert relative(found, truth) <= 1e-6
    mine, exact = (torch.autograd.grad(x, outputs.logits)[0] for x in (found, truth))
    assert relative(mine, exact) <= 1e-5


def test_their_loss_type(swift):
    """'cross_entropy' of the package's own map."""
    if not hasattr(swift.mapping, "CustomCrossEntropyLoss"):
        pytest.skip("needs the losses of the package")
    outputs, labels = numbers()
    scale, found = torch.rand(B * T), []
    for kind in (swift.mapping.loss_map["cross_entropy"], swift.ours.FusedCrossEntropy):
        loss = kind(None, trainer())(outputs, labels, loss_scale=scale)
        found.append((loss, *torch.autograd.grad(loss, outputs.logits)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_register_twice(swift):
    names = set(swift.mapping.loss_map)
    swift.ours.register()
    swift.ours.register()
    assert set(swift.mapping.loss_map) - names == {"fused_cross_entropy", "fused_dft"}


def test_words(swift):
    outputs, labels = numbers()
    with pytest.raises(NotImplementedError, match="sequence_parallel_size: expected 1, got 2"):
        swift.ours.FusedCrossEntropy(None, trainer(2))(outputs, labels)


def test_another_version():
    theirs = module("swift", __version__="4.7.0", __path__=[]), *stand_ins()[1:]
    with adapter(NAME, *theirs) as ours, pytest.raises(ImportError, match=r"expected version 4\.6\.x, .* got 4\.7\.0"):
        ours.patch()


def test_unpatch(swift):
    before = swift.utils.per_token_loss_func
    swift.ours.patch()
    assert swift.utils.per_token_loss_func is not before
    swift.ours.unpatch()


def test_a_plugin_file(swift, tmp_path):
    """As --external_plugins imports it."""
    if not hasattr(swift.mapping, "CustomCrossEntropyLoss"):
        pytest.skip("needs the losses of the package")
    plugin = tmp_path / "fused.py"
    plugin.write_text("from fused_losses.integrations import ms_swift\nms_swift.register()\nms_swift.patch()\n")
    importlib.import_module("swift.utils").import_external_file(str(plugin))
    outputs, labels = numbers()
    assert type(swift.utils.per_token_loss_func(outputs, pad(labels, (0, 0))).grad_fn).__name__ != "NllLossBackward0"
    swift.ours.unpatch()
