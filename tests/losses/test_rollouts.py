"""Numbers of sampled responses: importance weights of rollouts, entropy masks over one process and over ranks, advantages."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")

OLD, ROLLOUT = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -2.0, math.nan]])


@pytest.mark.parametrize(
    ("level", "mode", "low", "high", "found"),
    [
        ("token", "truncate", None, 2.0, [2.0, 1, 1]),
        ("token", "truncate", 1.5, 9.0, [math.e, 1.5, 1.5]),
        ("token", "mask", None, 2.0, [0, 1, 1]),
        ("token", "mask", 1.5, None, [math.e, 0, 0]),
        ("sequence", "truncate", None, 9.0, [math.e] * 3),
        ("sequence", "mask", 0.5, 2.0, [0, 0, 0]),
        ("geometric", "truncate", None, 9.0, [math.exp(1 / 3)] * 3),
    ],
)
def test_rollout_weights(level, mode, low, high, found):
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = fl.rollout_weights(OLD, ROLLOUT, mask, level=level, mode=mode, low=low, high=high)
    assert weights[0].tolist() == pytest.approx(found) and not weights.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_rollout_weights_match_the_twin(level, mode):
    """Padded and packed, with tokens that do not count and tokens that were not scored."""
    old = torch.randn(4, 6, dtype=torch.float64)
    rollout, mask = old + 0.5 * torch.randn_like(old), torch.rand(4, 6) > 0.3
    rollout[0, 1], rollout[1, 2] = math.nan, -math.inf
    named = {"level": level, "mode": mode, "low": 0.7, "high": 1.6}
    exact = fl.reference.rollout_weights(old, rollout, mask, **named)
    torch.testing.assert_close(fl.rollout_weights(old, rollout, mask, **named).double(), exact, rtol=1e-5, atol=1e-5)
    flat = [x.flatten() for x in (old, rollout, mask)]
    packed = fl.rollout_weights(*flat, cu_seqlens=torch.arange(5) * 6, **named)
    torch.testing.assert_close(packed.view(4, 6).double(), exact, rtol=1e-5, atol=1e-5)


def test_entropy_quantile_mask():
    entropy, mask = torch.tensor([[0.1, 0.9, 0.5], [0.7, 5.0, 0.3]]), torch.tensor([[True] * 3, [True, False, True]])
    assert fl.entropy_quantile_mask(entropy, mask, 0.4).tolist() == [[False, True, False], [True, False, False]]
    assert fl.entropy_quantile_mask(entropy, mask, 1.0).equal(mask)
    assert not fl.entropy_quantile_mask(entropy, ~mask & False, 0.5).any()
    many = torch.rand(7, 50, dtype=torch.float64)
    counts = torch.rand(7, 50) > 0.2
    for top in (0.05, 0.2, 0.77):
        kept = fl.entropy_quantile_mask(many.float(), counts, top)
        assert kept.equal(fl.reference.entropy_quantile_mask(many.float(), counts, top))


def check_quantile(rank, group):
    """Ranks of different sizes, one without tokens: the quantile is that of all of them."""
    whole = torch.rand(12, generator=torch.Generator().manual_seed(1))
    counts = torch.arange(12) % 5 > 0
    ends = [0, 7, 7, 12]
    own = slice(ends[rank], ends[rank + 1])
    for top in (0.1, 0.5, 1.0):
        mine = fl.entropy_quantile_mask(whole[own], counts[own], top, group)
        assert mine.equal(fl.reference.entropy_quantile_mask(whole, counts, top)[own])
    assert not fl.entropy_quantile_mask(whole[own], counts[own] & False, 0.5, group).any()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_entropy_quantile_of_all_ranks():
    on_ranks(3, check_quantile)


# ---- advantages --------------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    r = torch.tensor([1.0, 3.0, 5.0, 5.0])
    root = math.sqrt(2.0)
    assert fl.group_advantages(r, 2, "none").tolist() == [-1, 1, 0, 0]
    assert fl.group_advantages(r, 2).tolist() == pytest.approx([-1 / (root + 1e-4), 1 / (root + 1e-4), 0, 0])
    std = math.sqrt((2.5**2 + 0.5**2 + 2 * 1.5**2) / 3)
    assert fl.group_advantages(r, 2, "batch").tolist() == pytest.approx([-1 / (std + 1e-4), 1 / (std + 1e-4), 0, 0])
    assert fl.group_advantages(r, 1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_without_scores(scale):
    r = torch.randn(12, dtype=torch.float64)
    r[[1, 4, 5, 6]] = math.nan  # one of a group of four, three of the next
    found = fl.group_advantages(r, 4, scale)
    torch.testing.assert_close(found, fl.reference.group_advantages(r, 4, scale))
    assert not found[[1, 4, 5, 6]].any() and found[7] == 0 and found[0] != 0 and abs(found.sum()) < 1e-12


Y, A, P = torch.zeros(3, 4, dtype=torch.long), torch.ones(3), torch.zeros(3, 4)
BAD = [
    (lambda: fl.rollout_weights(P, P, Y == 0, level="tokens", mode="mask", high=2.0), ValueError,
     "level: expected one of token, sequence, geometric, got 'tokens'; did you mean 'token'"),
    (lambda: fl.rollout_weights(P, P, Y == 0, level="token", mode="clip", high=2.0), ValueError, "mode: expected one of"),
    (lambda: fl.rollout_weights(P, P, Y == 0, level="token", mode="truncate", low=0.5), ValueError, "high: expected the"),
    (lambda: fl.rollout_weights(P, P, Y == 0, level="token", mode="mask", low=2.0, high=1.0), ValueError, "low: expected"),
    (lambda: fl.rollout_weights(P, P[:2], Y == 0, level="token", mode="mask", high=1.0), ValueError,
     r"rollout_logps: expected \[3, 4\] on cpu, as the mask, got \[2, 4\]"),
    (lambda: fl.rollout_weights(P[0], P[0], Y[0] == 0, level="token", mode="mask", high=1.0), ValueError,
     r"old_logps: expected \[S, T\], or \[total\] with cu_seqlens, got \[4\]"),
    (lambda: fl.entropy_quantile_mask(P, Y, 0.2), TypeError, "mask: expected a bool tensor, got torch.int64"),
    (lambda: fl.entropy_quantile_mask(P, Y == 0, 0.0), ValueError, r"top: expected a number in \(0, 1\], got 0.0"),
    (lambda: fl.group_advantages(A, 2), ValueError, r"rewards: expected \[groups \* group_size\] for group_size=2, got \[3\]"),
    (lambda: fl.group_advantages(A, 0), ValueError, "rewards: expected"),
    (lambda: fl.group_advantages(A.long(), 3), TypeError, "rewards: expected a float tensor"),
    (lambda: fl.group_advantages(A, 3, "std"), ValueError, "scale: expected one of group, batch, none, got 'std'"),
    (lambda: fl.entropy_quantile_mask(P, Y == 0, 0.5, "ranks"), ValueError, "torch.distributed is not initialised"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_gets_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
