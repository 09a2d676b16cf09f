"""REBEL and A*-PO by hand and as TRL has it; values of prompts; the beta of beta-DPO."""

import math

import pytest
import torch
from family_batches import Batch
from ranks import on_ranks

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

P, Q = torch.tensor([[-1.0], [-2.0], [-3.0], [-1.5]]), torch.tensor([[-1.5], [-1.0], [-2.0], [-2.5]])
Y = torch.zeros(4, 1, dtype=torch.long)
H = (P - Q).squeeze(1)
R = torch.tensor([1.0, 0.2, -0.4, 0.7])


def test_rebel_by_hand():
    out = fl.rebel_loss(fl.LogProbs(P), Y, fl.LogProbs(Q), R, beta=0.3, shift=False, reduction="none")
    torch.testing.assert_close(out.loss, (0.3 * (H[:2] - H[2:]) - (R[:2] - R[2:])).square())
    # the order of the responses of a pair does not matter
    turned = [x[[2, 3, 0, 1]] for x in (P, Q, R)]
    other = fl.rebel_loss(
        fl.LogProbs(turned[0]), Y, fl.LogProbs(turned[1]), turned[2], beta=0.3, shift=False, reduction="none"
    )
    torch.testing.assert_close(other.loss, out.loss)


def test_a2po_as_trl_writes_it():
    """compute_loss of TRL 1.16's A2POTrainer, and its values of prompts, of two responses each."""
    beta1, beta2, rewards = 0.5, 1e-1, R.view(2, 2)
    v_star = beta1 * (torch.logsumexp(rewards / beta1, dim=1) - math.log(2))
    values = fl.optimal_values(R, 2, beta1)
    torch.testing.assert_close(values, v_star.repeat_interleave(2))
    implicit = beta2 * (P.sum(1) - Q.sum(1))
    expected = ((implicit - (R - v_star.repeat_interleave(2))) ** 2).mean()
    out = fl.a2po_loss(fl.LogProbs(P), Y, fl.LogProbs(Q), R - values, beta=beta2, shift=False)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.metrics["rewards"], implicit.mean())


def test_values_of_large_and_missing_rewards():
    r = torch.tensor([1000.0, 999.0, math.nan, 3.0, math.nan, math.nan], dtype=torch.float64)
    found = fl.optimal_values(r, 2, 0.1)
    assert found[:2].tolist() == pytest.approx([1000 + 0.1 * math.log((1 + math.exp(-10)) / 2)] * 2)
    assert found[2:4].tolist() == [3.0, 3.0] and found[4:].isnan().all()
    many = torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(fl.optimal_values(many, 4, 0.7), fl.reference.optimal_values(many, 4, 0.7))


# ---- beta-DPO ----------------------------------------------------------------------------------------------------------


def test_dynamic_beta_by_hand():
    beta = fl.DynamicBeta(0.2, 0.5, momentum=0.9)
    assert beta.update(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.2)  # M_0 is the first batch's own mean
    m0 = 0.9 * 2.0 + 0.1 * 4.0
    assert beta.update(torch.tensor([4.0])).item() == pytest.approx(0.2 * (1 + 0.5 * (4.0 - m0)))
    resumed = fl.DynamicBeta(0.2, 0.5)
    resumed.load_state_dict(beta.state_dict())
    assert resumed.beta == beta.beta and resumed.update(torch.tensor([1.0])) == beta.update(torch.tensor([1.0]))
    assert fl.DynamicBeta(0.2, 9.0).update(torch.tensor([1.0])).item() == pytest.approx(0.2)
    beta.update(torch.tensor([-1e6]))
    assert beta.beta.item() == pytest.approx(0.2 * 1e-3)  # the floor


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "sppo_hard", "apo_zero", ("sigmoid", "sft")], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_losses_with_a_dynamic_beta_match_the_twin(own_backend, loss_type, packed):
    """After a batch that set M_0; the state is updated once for a call, and the metric is the beta that was used."""

    def made(library):
        beta = fl.DynamicBeta(0.3, 0.8)
        beta.update(torch.tensor([0.3, -0.7]))
        batch = Batch("preference_loss", "sigmoid", packed)
        batch.options |= {"loss_type": loss_type, "beta": beta}
        out, grads = batch.call(library, torch.float64, "hidden", "hidden")
        return beta, out, grads

    (beta, out, grads), (other, truth, exact) = made(fl), made(fl.reference)
    torch.testing.assert_close(beta.beta.double(), other.beta.double())
    torch.testing.assert_close(out.loss, truth.loss)
    torch.testing.assert_close(grads, exact)
    torch.testing.assert_close(out.metrics["beta"].double(), beta.beta.double())
    assert beta.reference.count == 2 + 3 and out.metrics.keys() == truth.metrics.keys()


def check_ranks(rank, group):
    """Ranks of different sizes have one beta, that of all margins."""
    margins = torch.tensor([0.5, 2.0, -1.0, 4.0, 0.3])
    own = margins[:1] if rank == 0 else margins[1:]
    alone, shared = fl.DynamicBeta(0.2, 0.5), fl.DynamicBeta(0.2, 0.5, process_group=group)
    for scale in (1.0, 3.0):
        torch.testing.assert_close(shared.update(own * scale), alone.update(margins * scale))


@pytest.mark.slow
def test_dynamic_beta_of_all_ranks():
    on_ranks(2, check_ranks)


Z = torch.zeros(4, 1, 5)
BAD = [
    (lambda: fl.rebel_loss(Z, Y, Z, R[:2], beta=0.1, shift=False), ValueError, "rewards"),
    (lambda: fl.rebel_loss(Z, Y, Z, R, beta=0.0, shift=False), ValueError, "beta: expected a finite number > 0"),
    (lambda: fl.rebel_loss(Z, Y, Z, R, shift=False), TypeError, "beta"),
    (lambda: fl.rebel_loss(Z, Y, rewards=R, beta=0.1, shift=False), TypeError, "ref: expected the reference"),
    (lambda: fl.a2po_loss(Z, Y, Z, R.long(), beta=0.1, shift=False), TypeError, "advantages: expected"),
    (lambda: fl.optimal_values(R, 3, 0.1), ValueError, r"rewards: expected \[groups \* group_size\]"),
    (lambda: fl.DynamicBeta(0.0, 0.5), ValueError, "beta: expected a finite number > 0"),
    (lambda: fl.DynamicBeta(0.1, -0.5), ValueError, "alpha: expected a finite number >= 0"),
    (lambda: fl.DynamicBeta(0.1, 0.5, momentum=1.0), ValueError, "momentum: expected"),
    (lambda: fl.dpo_loss(Z, Y, Z, beta=fl.DynamicBeta(0.1, 0.5), weights=torch.ones(2), shift=False), ValueError,
     "weights: beside fl.DynamicBeta expected None"),
    (lambda: fl.preference_loss(Z, Y, Z, loss_type="aot", beta=fl.DynamicBeta(0.1, 0.5), shift=False), ValueError,
     "beta: loss_type 'aot' sorts over the batch"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
