"""The labels of a batch are read once: what is missing or does not fit is an error that says what to pass."""

import numpy as np
import pytest
import torch
from family_batches import family_call

import fused_losses as fl
from fused_losses.core.batch import read_batch
from fused_losses.core.sequence_parallel import sequence_shard
from fused_losses.losses import FAMILY

Y = torch.arange(12).view(4, 3)
CU = torch.tensor([0, 3, 3, 7, 12])
TEACHES = "shift: expected True or False for labels .* got none; True: labels are the input ids"


@pytest.mark.parametrize("name", [*FAMILY, "dpo_loss", "kto_baseline", "token_stats"])
@pytest.mark.parametrize("library", [fl, fl.reference], ids=["fl", "reference"])
def test_shift_has_no_default_where_there_is_a_time_axis(library, name):
    """Labels that are the input ids and labels that are shifted already look the same, and give other losses."""
    call = family_call(library, name)
    with pytest.raises(TypeError, match=TEACHES):
        call()
    assert torch.as_tensor(getattr(call(shift=False), "loss", 0.0)).isfinite().all()


@pytest.mark.parametrize("name", [n for n, entry in FAMILY.items() if entry.batch == "tokens"] + ["token_stats"])
def test_flat_labels_have_no_time_axis(name):
    family_call(fl, name, flat=True)()


@pytest.mark.parametrize("shift", ["yes", 1, 0, torch.tensor(True), np.True_])
def test_shift_is_a_bool(shift):
    hint = "" if shift == "yes" else r"; pass bool\(shift\)"
    with pytest.raises(TypeError, match=f"shift: expected True or False, got .* of type {type(shift).__name__}{hint}$"):
        fl.token_stats(torch.zeros(4, 3, 12), Y, shift=shift)


@pytest.mark.parametrize(
    "loss", [fl.preference_loss, fl.dpo_loss, fl.ipo_loss, fl.tdpo_loss, fl.distillation_loss], ids=lambda f: f.__name__
)
def test_a_reference_that_is_left_out_is_an_error(loss):
    """It would be another loss, without a reference."""
    name = "teacher" if loss is fl.distillation_loss else "ref"
    with pytest.raises(TypeError, match=rf"fl.{loss.__name__}: {name}: expected .*got none"):
        loss(torch.zeros(4, 3, 12), Y, shift=False)
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'labels' and"):
        loss(torch.zeros(4, 3, 12), shift=False)


def test_no_reference_is_said_by_none():
    z, y = torch.randn(4, 3, 12), Y
    assert fl.dpo_loss(z, y, None, shift=False).loss == fl.dpo_loss(z, y, ref=None, shift=False).loss


@pytest.mark.parametrize(("labels", "options"), [(Y, {}), (Y.flatten(), {"cu_seqlens": CU})], ids=["padded", "packed"])
def test_counts_and_masks(labels, options):
    labels = labels.masked_fill(labels % 5 == 1, -100)
    for shift in (False, True):
        batch = read_batch(labels, "pairs", {"shift": shift, **options})
        predicted = batch.predicted
        counts = predicted != -100
        assert batch.sequences == 4 and batch.count() == counts.sum()
        rows = torch.arange(12).view(4, 3) < 6 if not options else torch.arange(12) < 3
        assert batch.count(batch.among_first(2)) == (counts & rows).sum()
        again = batch.with_labels(batch.aligned(labels))
        assert torch.equal(again.predicted, predicted) and torch.equal(again.mask, batch.mask)


def test_without_a_group_nothing_is_exchanged():
    shard = sequence_shard(Y, None, None, True, False)
    assert shard.group is None and shard.first == 0 and shard.any(True, Y.device)
    x = torch.ones(3)
    assert shard.whole([x])[0] is x and shard.own(x) is x and shard.summed(x) is x
