"""One rank's part of a vocabulary, without other ranks: test_vocab_parallel.py has these."""

import torch

import fused_losses as fl
from fused_losses.backends import torch_backend
from fused_losses.core.layout import StatsSpec
from fused_losses.engine.vocab_parallel import VocabShard, shard_of

SPEC = StatsSpec((), False, False, shift=False, ignore_index=-100, vocab=20, first=40)


def test_without_a_group_nothing_is_exchanged():
    x, state = torch.randn(3, 20), torch.randn(14, 3)
    shard = shard_of(fl.Logits(x))
    assert shard == shard_of(fl.Hidden(x, torch.randn(9, 20))) == VocabShard()
    assert shard.whole(SPEC) is SPEC and shard.merged(SPEC, torch_backend, state) is state and shard.summed(x) is x


def test_labels_are_checked_against_the_whole_vocabulary():
    assert VocabShard("name", 40, 60).whole(SPEC) == SPEC._replace(vocab=60, first=0)
