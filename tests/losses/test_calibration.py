"""calibration: against a loop over pairs, over batches, on made-up log-probs."""

import math

import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.usefixtures("one_thread")


def by_loop(logps, mask, bins):
    """Expected calibration error, one pair after another."""
    found = [[] for _ in range(bins)]
    b = len(logps) // 2
    for w, l in zip(range(b), range(b, 2 * b), strict=True):
        if not (mask[w].any() and mask[l].any()):
            continue
        good, bad = (logps[s][mask[s]].mean().item() for s in (w, l))
        found[min(bins - 1, int(math.exp(good) * bins))].append((math.exp(good), good > bad))
    total = sum(len(x) for x in found)
    return sum(abs(sum(c for _, c in x) - sum(p for p, _ in x)) for x in found) / max(1, total), [len(x) for x in found]


def batch(pairs=40, length=5, vocab=7):
    z = 4 * torch.randn(2 * pairs, length, vocab)
    y = z.argmax(-1).where(torch.rand(2 * pairs, length) < 0.8, torch.randint(0, vocab, (2 * pairs, length)))
    y[torch.rand(2 * pairs, length) < 0.3] = -100
    y[3], y[pairs + 5] = -100, -100
    return z, y


@pytest.mark.parametrize("bins", [1, 4, 10])
@pytest.mark.parametrize("shift", [False, True])
def test_matches_a_loop(device, bins, shift):
    z, y = (x.to(device) for x in batch())
    stats = fl.dpo_loss(z, y, None, shift=shift).stats
    found = fl.calibration(stats, bins=bins)
    error, counts = by_loop(stats.logps, stats.mask, bins)
    assert found.counts.tolist() == counts and 0 < sum(counts) < 40
    assert found.error.item() == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("shift", [False, True])
def test_packed(shift):
    z, y = batch()
    cu = torch.arange(81) * 5
    padded = fl.calibration(fl.dpo_loss(z, y, None, shift=shift).stats)
    packed = fl.dpo_loss(z.flatten(0, 1), y.flatten(), None, cu_seqlens=cu, shift=shift).stats
    found = fl.calibration(packed, cu_seqlens=cu)
    torch.testing.assert_close(found.error, padded.error)
    assert torch.equal(found.counts, padded.counts)


def test_batches_add():
    z, y = batch()
    whole = fl.calibration(fl.dpo_loss(z, y, None, shift=False).stats)
    total = None
    for rows in (slice(0, 13), slice(13, 40)):
        pick = lambda x, rows=rows: torch.cat([x[:40][rows], x[40:][rows]])  # noqa: E731
        part = fl.calibration(fl.dpo_loss(pick(z), pick(y), None, shift=False).stats)
        total = part if total is None else total + part
    assert total.error.item() == pytest.approx(whole.error.item(), rel=1e-12)
    assert torch.equal(total.counts, whole.counts)


def test_by_hand():
    """Of four pairs at confidence 3/4 three are right: calibrated; of the two that are certain one is wrong."""
    y = torch.zeros(12, 2, dtype=torch.long)
    p = torch.tensor([0.75] * 4 + [1.0] * 2 + [0.5] * 3 + [0.9] + [0.5, 1.0], dtype=torch.float64)
    stats = fl.dpo_loss(fl.LogProbs(p.log()[:, None].expand(12, 2).contiguous()), y, None, shift=False).stats
    found = fl.calibration(stats)
    assert found.counts.tolist() == [0] * 7 + [4, 0, 2] and found.correct.tolist() == [0] * 7 + [3, 0, 1]
    assert found.error.item() == pytest.approx(1 / 6, rel=1e-12)  # at a tie nothing is preferred
    assert fl.calibration(stats, bins=1).error.item() == pytest.approx(1 / 6, rel=1e-12)
    assert not found.error.requires_grad


def test_of_nothing():
    z, y = batch(8)
    assert fl.calibration(fl.dpo_loss(z, torch.full_like(y, -100), None, shift=False).stats).error == 0
    assert fl.calibration(fl.dpo_loss(z[:0], y[:0], None, shift=False).stats).error == 0


def test_bad_input_gets_words():
    z, y = batch(8)
    stats = fl.dpo_loss(z, y, None, shift=False).stats
    with pytest.raises(ValueError, match="bins: expected an int >= 1, got 0"):
        fl.calibration(stats, bins=0)
    with pytest.raises(TypeError, match="stats: expected TokenStats, .* got Tensor"):
        fl.calibration(stats.logps)
    odd = fl.token_stats(z[:3], y[:3], shift=False)
    with pytest.raises(ValueError, match=r"expected \[2B, T\]"):
        fl.calibration(odd)
