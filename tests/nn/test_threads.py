"""Other threads may run a model, and call at_head with it, while one is inside at_head: each gets what it would alone."""

import threading

import pytest
import torch
from around_models import new
from tiny_models import assert_same, batch

import fused_losses as fl

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WAIT = 120  # seconds, until a test fails that would hang


class Threads:
    """Functions on threads of their own, whose errors are raised here."""

    def __init__(self):
        self.errors, self.threads = [], []

    def start(self, function):
        def run():
            try:
                function()
            except BaseException as e:
                self.errors.append(e)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join(WAIT)
        if self.errors:
            raise self.errors[0]
        assert not any(t.is_alive() for t in self.threads)


class Pause:
    """A place where one thread waits until another says go."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def here(self):
        self.reached.set()
        assert self.go.wait(WAIT)


def untouched(model):
    return all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())


def logps(labels):
    return lambda p: fl.token_stats(p, labels, shift=True).logps


def test_a_forward_while_another_thread_measures():
    pause, waits = Pause(), []

    def around(self, z):
        if threading.get_ident() in waits and not pause.reached.is_set():
            pause.here()
        return z * 2

    model = new(around)
    inputs, labels = batch()
    truth = model(**inputs).logits
    threads = Threads()

    def measure():
        waits.append(threading.get_ident())
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)

    threads.start(measure)
    assert pause.reached.wait(WAIT)
    assert untouched(model) and model.state_dict()
    torch.testing.assert_close(model(**inputs).logits, truth, rtol=0, atol=0)
    fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)
    assert_same(fl.find_head(model).source(fl.backbone(model)(**inputs).last_hidden_state), truth, labels)
    pause.go.set()
    threads.join()
    assert untouched(model)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_forward_while_another_thread_is_in_its_loss(hooked):
    """Also of a model of which accelerate holds the forwards, and whose head has a pre-hook."""
    model, pause, threads = new(lambda self, z: z * 2), Pause(), Threads()
    if hooked:
        hooks = pytest.importorskip("accelerate.hooks")
        for m in (model, model.lm_head):
            hooks.add_hook_to_module(m, hooks.AlignDevicesHook(io_same_device=True))
        model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
    before = {k: dict(m.__dict__) for k, m in model.named_modules()}
    inputs, labels = batch()
    truth = model(**inputs).logits
    found = []

    def loss(p):
        pause.here()
        return logps(labels)(p)

    threads.start(lambda: found.append(fl.at_head(model, loss, **inputs).out))
    assert pause.reached.wait(WAIT)
    torch.testing.assert_close(model(**inputs).logits, truth, rtol=0, atol=0)
    torch.testing.assert_close(model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False)[:, :6], labels)
    with torch.no_grad():
        fl.at_head(model, lambda p: assert_same(p, truth, labels), **inputs)
    pause.go.set()
    threads.join()
    torch.testing.assert_close(found[0], logps(labels)(truth))
    for k, m in model.named_modules():
        assert m.__dict__.keys() == before[k].keys(), k
        assert m.__dict__.get("forward") is before[k].get("forward")
        assert m.__dict__.get("_old_forward") is before[k].get("_old_forward")
        assert len(m._forward_hooks) == 0


@pytest.mark.parametrize("first", [0, 1])
def test_two_threads_in_at_head(first):
    """Either may leave first; each has its own inputs, and their gradients add up."""
    model, threads = new(lambda self, z: z * 2), Threads()
    pauses, batches, found = [Pause(), Pause()], [batch(), batch(2, 5)], {}

    def work(i):
        inputs, labels = batches[i]

        def loss(p):
            pauses[i].here()
            return logps(labels)(p)

        found[i] = fl.at_head(model, loss, **inputs).out

    for i in (0, 1):
        threads.start(lambda i=i: work(i))
        assert pauses[i].reached.wait(WAIT)
    pauses[first].go.set()
    threads.threads[first].join(WAIT)
    inputs, labels = batches[first]
    torch.testing.assert_close(found[first], logps(labels)(model(**inputs).logits))  # the other is still inside
    pauses[1 - first].go.set()
    threads.join()
    assert untouched(model)
    parameters = list(model.parameters())
    truth = sum(logps(labels)(model(**inputs).logits).sum() for inputs, labels in batches)
    ours = torch.autograd.grad(found[0].sum() + found[1].sum(), parameters)
    torch.testing.assert_close(ours, torch.autograd.grad(truth, parameters), rtol=1e-8, atol=1e-10)


def test_many_at_once():
    """Nothing is left behind, and nobody gets another's states."""
    model, threads, count = new(lambda self, z: z * 2), Threads(), 4
    start = threading.Barrier(count)

    def work():
        inputs, labels = batch()
        with torch.no_grad():
            start.wait(WAIT)
            for _ in range(3):
                found = fl.at_head(model, logps(labels), **inputs).out
                torch.testing.assert_close(found, logps(labels)(model(**inputs).logits))

    for _ in range(count):
        threads.start(work)
    threads.join()
    assert untouched(model)


def test_a_failing_loss_does_not_disturb_another_thread():
    model, pause, threads = new(), Pause(), Threads()
    inputs, labels = batch()
    found = []

    def loss(p):
        pause.here()
        return logps(labels)(p)

    threads.start(lambda: found.append(fl.at_head(model, loss, **inputs).out))
    assert pause.reached.wait(WAIT)
    with pytest.raises(ZeroDivisionError):
        fl.at_head(model, lambda p: 1 / 0, **inputs)
    pause.go.set()
    threads.join()
    torch.testing.assert_close(found[0], logps(labels)(model(**inputs).logits))
    assert untouched(model)
