"""softcap and scale are what the model's forward does now: measured again where they change, refused where they are learned."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from around_models import Scaler, new
from tiny_models import SMALL, V, assert_same, batch
from torch import nn

import fused_losses as fl

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def plain_tensor():
    model = new(lambda self, z: z * self.held["t"][0])
    model.held = {"t": [torch.tensor(2.0)]}
    return model


def in_closure():
    box, model = {"factor": 2.0, "tensor": torch.tensor(2.0)}, new()
    model.around, model.box = lambda z: z * box["factor"] * box["tensor"], box
    return model


def own_forward():
    model = new(factor=2.0)
    before = model.forward

    def forward(*args, **options):
        out = before(*args, **options)
        out.logits = out.logits * model.factor
        return out

    model.forward = forward
    return model


def set_to(name, value):
    return lambda m: setattr(m, name, value)


CHANGING = {  # a model, and what happens to it in turn
    "training": (
        lambda: new(lambda self, z: z * 2 if self.training else z),
        [lambda m: m.train(), lambda m: m.eval()],
    ),
    "bool": (
        lambda: new(lambda self, z: 5 * torch.tanh(z / 5) if self.capped else z, capped=False),
        [set_to("capped", True), set_to("capped", False)],
    ),
    "word": (
        lambda: new(lambda self, z: z * {"hot": 0.5, "cold": 2.0}[self.mode], mode="hot"),
        [set_to("mode", "cold")],
    ),
    "attribute": (lambda: new(lambda self, z: z * self.factor), [set_to("factor", 0.5), set_to("factor", 2)]),
    "number or none": (
        lambda: new(lambda self, z: z if self.cap is None else self.cap * torch.tanh(z / self.cap), cap=None),
        [set_to("cap", 4.0), set_to("cap", None)],
    ),
    "class": (
        lambda: new(lambda self, z: z * self.factor),
        [lambda m: setattr(type(m), "factor", 3.0)],
    ),
    "dict in a list": (
        lambda: new(lambda self, z: z * self.held[0]["x"], held=[{"x": 2.0}]),
        [lambda m: m.held[0].update(x=0.5)],
    ),
    "dict in config": (
        lambda: new(lambda self, z: z * getattr(self.config, "more", {"x": {"y": [2.0]}})["x"]["y"][0]),
        [lambda m: setattr(m.config, "more", {"x": {"y": [4.0]}}), lambda m: m.config.more["x"]["y"].append(1.0)],
    ),
    "module between": (
        lambda: new(lambda self, z: self.scaler(z), scaler=Scaler(2.0)),
        [lambda m: setattr(m.scaler, "factor", 0.5), lambda m: m.scaler.train(), set_to("scaler", Scaler(4.0))],
    ),
    "hook between": (
        lambda: new(lambda self, z: self.scaler(z), scaler=Scaler(2.0)),
        [lambda m: m.scaler.register_forward_hook(lambda m, a, out: out * 0.5)],
    ),
    "mode of the head": (
        lambda: new(lambda self, z: z * (2 if self.lm_head.training else 1)),
        [lambda m: m.lm_head.train()],
    ),
    "buffer in place": (
        lambda: new(lambda self, z: z * self.gain, gain=torch.tensor(2.0)),
        [lambda m: m.gain.fill_(0.5), lambda m: m.gain.data.fill_(0.25), set_to("gain", torch.tensor(8.0))],
    ),
    "bool tensor": (
        lambda: new(lambda self, z: torch.where(self.on, z * 2, z), on=torch.tensor(True)),
        [lambda m: m.on.logical_not_(), lambda m: m.on.logical_not_()],
    ),
    "number of a tensor": (
        lambda: new(lambda self, z: z * (1.0 + self.steps.item()), steps=torch.tensor(1)),
        [lambda m: m.steps.add_(1)],
    ),
    "tensor in a list": (plain_tensor, [lambda m: m.held["t"][0].fill_(0.5)]),
    "closure": (
        in_closure,
        [lambda m: m.box.update(factor=0.5), lambda m: m.box["tensor"].fill_(0.5)],
    ),
    "own forward": (own_forward, [set_to("factor", 0.5), lambda m: m.__dict__.pop("forward")]),
    "frozen parameter": (
        lambda: new(lambda self, z: z * self.gain, gain=nn.Parameter(torch.tensor(2.0), requires_grad=False)),
        [lambda m: m.gain.data.fill_(0.5)],
    ),
    "backbone's buffer": (
        lambda: new(lambda self, z: z * (1 + self.model.rotary_emb.inv_freq[0])),
        [lambda m: m.model.rotary_emb.inv_freq.fill_(2.0)],
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_is_measured_again(name):
    make, changes = CHANGING[name]
    model = make()
    inputs, labels = batch()
    whole = name != "frozen parameter"  # which belongs to neither backbone nor head
    head = fl.find_head(model) if whole else None
    for change in (lambda m: None, *changes, lambda m: None):
        change(model)
        with torch.no_grad():
            truth = model(**inputs).logits
            fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)  # noqa: B023
            if head is not None:
                assert_same(head.source(fl.backbone(model)(**inputs).last_hidden_state), truth, labels)


def closed_over():
    factor, model = nn.Parameter(torch.tensor(2.0)), new()
    model.around = lambda z: z * factor
    return model


LEARNED = {  # and what the refusal calls it
    "scale": (lambda: new(lambda self, z: z * self.gain, gain=nn.Parameter(torch.tensor(2.0))), "gain"),
    "its logarithm": (lambda: new(lambda self, z: z * self.gain.exp(), gain=nn.Parameter(torch.tensor(0.0))), "gain"),
    "as a number": (lambda: new(lambda self, z: z * self.gain.item(), gain=nn.Parameter(torch.tensor(2.0))), "gain"),
    "softcap": (
        lambda: new(lambda self, z: self.cap * torch.tanh(z / self.cap), cap=nn.Parameter(torch.tensor(9.0))),
        "cap",
    ),
    "bias, zero as yet": (lambda: new(lambda self, z: z + self.b, b=nn.Parameter(torch.zeros(V))), "b"),
    "norm of the head": (lambda: new(lambda self, z: z / self.lm_head.weight.norm()), "lm_head.weight"),
    "in a module": (
        lambda: new(lambda self, z: z * self.inner.weight.abs().sum(), inner=nn.Linear(1, 1)),
        "inner.weight",
    ),
    "outside of the model": (closed_over, r"a tensor \[\]|a tensor that requires grad"),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_is_refused(name):
    make, words = LEARNED[name]
    model = make()
    inputs, labels = batch()
    for call in (lambda: fl.at_head(model, lambda p: p, **inputs), lambda: fl.find_head(model)):
        with pytest.raises(
            NotImplementedError, match=rf"Around.lm_head .*depend on ({words}), whose gradient would be"
        ):
            call()
    with torch.no_grad():  # where no gradient is lost
        truth = model(**inputs).logits
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)


def test_measured_once_where_nothing_changes():
    calls = []
    model = new(lambda self, z: (calls.append(1), z * 2)[1])
    inputs, _ = batch()
    head = fl.find_head(model)
    states = fl.backbone(model)(**inputs).last_hidden_state
    measured = len(calls)
    for _ in range(3):
        fl.at_head(model, lambda p: p, **inputs)
        head.source(states)
    assert len(calls) == measured + 3  # the forwards of at_head themselves


def test_tensors_that_do_not_matter_are_no_reason():
    """A buffer that forward reads for something else, and one that cannot hold any number."""

    def around(self, z):
        assert self.table[self.index] == 7
        return z * 2

    model = new(around, table=torch.full((3,), 7), index=torch.tensor(1))
    inputs, labels = batch()
    truth = model(**inputs).logits
    fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)
    assert fl.find_head(model).options["scale"] == 2.0


def test_the_model_is_not_touched(monkeypatch):
    """Not even while its forward is measured."""
    seen = []

    def around(self, z):
        seen.append((self is model, self.lm_head is model.lm_head, self.model is model.model))
        self.count = len(seen)
        self.scaler.register_forward_hook(lambda *_: None)
        state = model.state_dict()
        assert state.keys() == keys and all("forward" not in m.__dict__ for m in model.modules())
        return self.scaler(z)

    model = new(around, scaler=Scaler(2.0))
    keys = model.state_dict().keys()
    fl.find_head(model)
    assert seen and set(seen) == {(False, False, False)}
    assert not hasattr(model, "count") and not model.scaler._forward_hooks


def test_a_head_that_was_found_outlives_its_model_and_is_copied():
    model = new(factor=2.0, around=lambda self, z: z * self.factor)
    head, states = fl.find_head(model), torch.zeros(2, SMALL["hidden_size"]).double()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other.source(states).scale == 2.0 and other.weight is not head.weight
    both = copy.deepcopy(nn.ModuleDict({"model": model, "head": head}))
    assert both["head"].weight is both["model"].lm_head.weight
    gone = [weakref.ref(model), weakref.ref(model.model), weakref.ref(model.lm_head)]
    del model, both
    gc.collect()
    assert [x() for x in gone] == [None] * 3 and head.source(states).scale == 2.0


def test_another_head_since():
    model = new()
    head, states = fl.find_head(model), torch.zeros(2, SMALL["hidden_size"]).double()
    model.set_output_embeddings(nn.Linear(SMALL["hidden_size"], V).double())
    with pytest.raises(ValueError, match="its model has another head now, Linear; make a new FusedHead"):
        head.source(states)


def test_accelerates_wrapped_forwards():
    """Bound methods, partials and objects that hold the model: mixed precision, and weights fetched on demand."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils.operations import convert_outputs_to_fp32

    model = new(lambda self, z: z * self.factor, factor=2.0)
    inputs, labels = batch()
    truth = model(**inputs).logits
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(io_same_device=True))
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16, enabled=False)(model.forward))
    for factor in (2.0, 0.5):
        model.factor = factor
        fl.at_head(model, lambda p: assert_same(p, truth * factor / 2, labels), **inputs)  # noqa: B023
    assert isinstance(fl.find_head(model), fl.FusedHead)


def test_a_head_that_was_found_compiles():
    """Where softcap and scale are those that were measured last."""
    model = new(lambda self, z: z * self.factor, factor=2.0)
    head, (_, labels) = fl.find_head(model), batch()
    states = torch.randn(*labels.shape, SMALL["hidden_size"], dtype=torch.float64)
    logps = lambda x: fl.token_stats(head.source(x), labels, shift=True).logps  # noqa: E731
    compiled = torch.compile(logps, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(states), logps(states))
