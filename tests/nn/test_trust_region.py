"""TrustRegion: soft and hard updates of every kind of tensor, its schedule, losses right after an update, refusals."""

import copy
import math

import pytest
import torch
from torch import nn

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

V, H = 13, 8


class Model(nn.Module):
    """Tied embedding and head, a BatchNorm (float and integer buffers), a buffer that is not persistent."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.body, self.norm = nn.Embedding(V, H), nn.Linear(H, H), nn.BatchNorm1d(H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("cache", torch.randn(3), persistent=False)

    def forward(self, ids):
        x = torch.tanh(self.body(self.embed(ids)))
        return self.head(self.norm(x.flatten(0, -2)).view(x.shape))


def models(dtype=torch.float32, tied=True):
    """A reference and a policy that has moved away from it, in float32."""
    policy = Model(tied)
    reference = copy.deepcopy(policy).to(dtype)
    with torch.no_grad():
        for x in [*policy.parameters(), policy.norm.running_mean, policy.norm.running_var]:
            x.add_(torch.rand_like(x))
        policy.norm.num_batches_tracked += 7
        policy.flags.logical_not_()
    return reference, policy


def floats(model):
    return {n: x.detach().clone() for n, x in model.state_dict().items() if x.is_floating_point()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_an_update_mixes_parameters_and_buffers(dtype, alpha):
    reference, policy = models(dtype)
    before, theirs, cache = floats(reference), floats(policy), reference.cache.clone()
    storage = reference.embed.weight.data_ptr()
    region = fl.TrustRegion(reference, policy, alpha=alpha, every=1)
    assert region.step()
    assert len(before) == 8  # the tied weight under both of its names
    for n, x in floats(reference).items():
        exact = alpha * theirs[n].double() + (1 - alpha) * before[n].double()
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-7)
    assert reference.norm.num_batches_tracked == 7 and reference.flags.tolist() == policy.flags.tolist()
    assert torch.equal(reference.cache, cache)
    assert reference.embed.weight is reference.head.weight and reference.embed.weight.data_ptr() == storage
    for n, x in floats(policy).items():
        assert torch.equal(x, theirs[n])


def test_low_precision_of_one_kind():
    """Both models in bfloat16: one rounding of the exact mix."""
    reference, policy = models(torch.bfloat16)
    policy = policy.bfloat16()
    before, theirs = floats(reference), floats(policy)
    fl.TrustRegion(reference, policy, alpha=0.6).update()
    for n, x in floats(reference).items():
        exact = 0.6 * theirs[n].double() + 0.4 * before[n].double()
        torch.testing.assert_close(x.double(), exact, rtol=2**-8, atol=0)


def test_a_hard_update_is_a_copy():
    reference, policy = models()
    fl.TrustRegion(reference, policy, alpha=1, every=1).step()
    for n, x in floats(reference).items():
        assert torch.equal(x, floats(policy)[n]), n


def test_schedule_and_resumption():
    reference, policy = models()
    region = fl.TrustRegion(reference, policy, every=3)
    assert [region.step() for _ in range(5)] == [False, False, True, False, False]
    saved, weights = region.state_dict(), copy.deepcopy(reference.state_dict())
    assert saved == {"steps": 5, "updates": 1, "alpha": 0.6, "every": 3}
    fresh = copy.deepcopy(reference)
    resumed = fl.TrustRegion(fresh, policy, every=3)
    resumed.load_state_dict(saved)
    fresh.load_state_dict(weights)
    assert [resumed.step() for _ in range(4)] == [region.step() for _ in range(4)] == [True, False, False, True]
    assert resumed.stamp() == region.stamp() == 3
    for n, x in floats(fresh).items():
        assert torch.equal(x, floats(reference)[n])
    for state, words in (
        ({"steps": 1}, "state: expected the keys"),
        (saved | {"every": 4}, "saved with every=4, and this has 3"),
        (saved | {"alpha": 1.0}, "saved with alpha=1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            resumed.load_state_dict(state)


def test_stale_log_probs_are_refused():
    region = fl.TrustRegion(*models(), every=2)
    stamp = region.stamp()
    region.step()
    region.check(stamp)
    region.step()
    with pytest.raises(RuntimeError, match="after 0 updates, but it has had 1: they are stale"):
        region.check(stamp)
    region.check(region.stamp())
    with pytest.raises(TypeError, match="stamp: expected an int"):
        region.check(None)


def test_the_reference_is_frozen_and_the_policy_is_not():
    reference, policy = models()
    fl.TrustRegion(reference, policy)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())


def test_tied_in_the_policy_alone():
    """Its one weight moves both of the reference's."""
    reference, policy = models(tied=False)[0], models()[1]
    fl.TrustRegion(reference, policy, alpha=1, every=1).step()
    assert torch.equal(reference.head.weight, policy.embed.weight)
    assert reference.head.weight is not reference.embed.weight


def test_tensors_that_were_replaced_are_found():
    reference, policy = models()
    region = fl.TrustRegion(reference, policy, alpha=1, every=1)
    policy.double()  # replaces buffers
    reference.load_state_dict(Model().state_dict(), assign=True)
    reference.head.weight = reference.embed.weight
    region.step()
    torch.testing.assert_close(reference.norm.running_mean, policy.norm.running_mean.float())
    torch.testing.assert_close(reference.body.weight, policy.body.weight.float())


def test_through_compile():
    reference, policy = models()
    fl.TrustRegion(reference, torch.compile(policy), alpha=1, every=1).step()
    assert torch.equal(reference.body.weight, policy.body.weight)
    policy.body = torch.compile(policy.body)
    with torch.no_grad():
        policy.body.weight.add_(1)
    fl.TrustRegion(reference, policy, alpha=1, every=1).step()
    assert torch.equal(reference.body.weight, policy.body._orig_mod.weight)


def test_shards(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no torch.distributed")
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))

        def split(model, placement):
            model.body.weight = nn.Parameter(distribute_tensor(model.body.weight.detach(), mesh, [placement]))
            return model

        reference, policy = models()
        before, theirs = reference.body.weight.detach().clone(), policy.body.weight.detach().clone()
        reference, policy = split(reference, Shard(0)), split(policy, Shard(0))
        fl.TrustRegion(reference, policy, alpha=0.25, every=1).step()
        torch.testing.assert_close(reference.body.weight.full_tensor(), 0.25 * theirs + 0.75 * before)
        with pytest.raises(ValueError, match="expected body.weight split over the same devices"):
            fl.TrustRegion(split(models()[0], Replicate()), policy)
        with pytest.raises(ValueError, match="got a plain tensor"):
            fl.TrustRegion(reference, models()[1])
        reference, policy = models()
        fl.TrustRegion(reference, DistributedDataParallel(policy), alpha=1, every=1).step()
        assert torch.equal(reference.body.weight, policy.body.weight)
    finally:
        distributed.destroy_process_group()


def test_losses_right_after_a_hard_update():
    """Every log-ratio is 0: DPO ln 2 with d loss / d h = -+ beta / 2, IPO 1 / (4 beta^2), KTO 1/2; before, none of them."""
    reference, policy = models()
    reference.eval(), policy.eval()
    region, beta = fl.TrustRegion(reference, policy, alpha=1, every=2), 0.2
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    ids = torch.randint(0, V, (4, 6))
    good = torch.tensor([True, True, False, False])
    for step in range(1, 5):
        with torch.no_grad():
            ref = reference(ids)
        z = policy(ids)
        h = (fl.token_stats(z, ids, ref, shift=True).logps - fl.token_stats(ref, ids, shift=True).logps).sum(1)
        dpo = fl.dpo_loss(z, ids, ref, beta=beta, shift=True)
        ipo = fl.preference_loss(z, ids, ref, loss_type="ipo", beta=beta, shift=True).loss.item()
        kto = fl.kto_loss(z, ids, ref, good, beta=beta, shift=True).loss.item()
        if step == 3:
            assert not h.any()
            assert dpo.loss.item() == pytest.approx(math.log(2), rel=1e-6)
            assert ipo == pytest.approx(1 / (4 * beta**2), rel=1e-6) and kto == pytest.approx(0.5, rel=1e-6)
            for key in fl.divergences.linkable():
                f_dpo = fl.dpo_loss(z, ids, ref, divergence=key, shift=True).loss.item()
                assert f_dpo == pytest.approx(math.log(2), rel=1e-6)
            g = torch.autograd.grad(dpo.stats.logps.sum(), z, retain_graph=True)[0]
            sign = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None, None]
            torch.testing.assert_close(torch.autograd.grad(dpo.loss, z, retain_graph=True)[0], sign * beta / 2 / 2 * g)
        else:
            assert h.abs().min() > 1e-3 and abs(dpo.loss.item() - math.log(2)) > 1e-4
            assert abs(ipo - 1 / (4 * beta**2)) > 1e-3 and abs(kto - 0.5) > 1e-4
        optimizer.zero_grad()
        dpo.loss.backward()
        optimizer.step()
        assert region.step() == (step % 2 == 0)


def refused(change=lambda reference, policy: None, **options):
    reference, policy = models()
    pair = change(reference, policy) or (reference, policy)
    return fl.TrustRegion(*pair, **options)


def quantised(reference, policy):
    policy.body.weight = nn.Parameter(torch.zeros(H, H, dtype=torch.int8), requires_grad=False)


def empty(reference, policy):
    reference.body.weight = nn.Parameter(torch.zeros(0))
    policy.body.weight = nn.Parameter(torch.zeros(0))


def shared(reference, policy):
    reference.body = policy.body


def reshaped(reference, policy):
    policy.body.weight = nn.Parameter(torch.zeros(H, 2 * H))


class Packed(torch.Tensor):
    """What libraries of quantisation make: a tensor of a float dtype that is really others."""

    def __tensor_flatten__(self):
        return [], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        raise NotImplementedError


def wrapped(reference, policy):
    policy.body.weight = nn.Parameter(torch.zeros(H, H).as_subclass(Packed))


BAD = [
    (lambda: refused(alpha=0), ValueError, r"alpha: expected a number in \(0, 1\], got 0"),
    (lambda: refused(alpha=1.5), ValueError, "alpha"),
    (lambda: refused(alpha=float("nan")), ValueError, "alpha"),
    (lambda: refused(every=0), ValueError, "every: expected an int >= 1, got 0"),
    (lambda: refused(every=2.0), ValueError, "every"),
    (lambda: refused(lambda r, p: (r, None)), TypeError, "policy: expected a torch.nn.Module, got NoneType"),
    (lambda: refused(lambda r, p: (p, p)), ValueError, "policy: shares embed.weight with the reference.*deepcopy"),
    (lambda: refused(shared), ValueError, "policy: shares body.weight with the reference"),
    (
        lambda: refused(lambda r, p: (r, nn.Sequential(p))),
        ValueError,
        "names, but 20 are in one of them only.*adapters",
    ),
    (lambda: refused(reshaped), ValueError, r"expected body.weight like the reference's, .*\[8, 8\], got .*\[8, 16\]"),
    (
        lambda: refused(lambda r, p: (r, models(tied=False)[1])),
        ValueError,
        "head.weight is tied to embed.weight, which",
    ),
    (lambda: refused(lambda r, p: (r, p.to("meta"))), ValueError, "policy: .* is on the meta device"),
    (lambda: refused(empty), ValueError, "reference: body.weight has no elements.*GatheredParameters"),
    (lambda: refused(quantised), TypeError, "policy: body.weight is quantised.*torch.int8"),
    (lambda: refused(wrapped), TypeError, "policy: body.weight is quantised.*Packed"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()


def test_frozen_layers_may_be_shared():
    reference, policy = models()
    reference.body = policy.body.requires_grad_(False)
    fl.TrustRegion(reference, policy, alpha=1, every=1).step()
    assert torch.equal(reference.head.weight, policy.head.weight)


@pytest.mark.gpu
def test_models_on_two_devices(device):
    reference, policy = models(torch.bfloat16)
    before, theirs = floats(reference), floats(policy)
    fl.TrustRegion(reference, policy.to(device), alpha=0.6, every=1).step()
    for n, x in floats(reference).items():
        exact = 0.6 * theirs[n].double() + 0.4 * before[n].double()
        torch.testing.assert_close(x.double(), exact, rtol=2**-8, atol=1e-7)
