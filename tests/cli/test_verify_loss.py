"""fl.verify_loss: every loss of the registry agrees with its reference, and where a broken one differs is said."""

from dataclasses import replace
from functools import wraps

import pytest
import torch

import fused_losses as fl
from fused_losses.cli import loss_batches
from fused_losses.cli.verify_loss import verify_loss
from fused_losses.losses import FAMILY

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"preference_loss": ["sigmoid", "ipo", "MPO"], "grpo_loss": ["grpo", "GSPO"]}  # tests/losses has the others


@pytest.mark.parametrize("name", FAMILY)
def test_the_registry_is_right(name):
    variants = FEW.get(name, list(FAMILY[name].variants))
    report = fl.verify_loss(name, variants=variants, device="cpu")
    assert report.ok, report
    assert str(report).startswith(f"loss {name}: nothing is wrong\n  ran: ")


def changed(change, loss=fl.simpo_loss):
    """The entry of a loss, with another output: change(out, options)."""

    @wraps(loss)
    def call(*args, **options):
        return change(loss(*args, **options), options)

    return replace(FAMILY[loss.__name__], call=call)


def with_loss(f):
    return lambda out, options: fl.LossOutput(f(out, options), out.metrics, out.stats)


def only(**wanted):
    """The loss times 3 where the options are these."""
    asked = lambda options: all(options.get(n) == x for n, x in wanted.items())  # noqa: E731
    return with_loss(lambda out, options: out.loss * (3 if asked(options) else 1))


def wrong_metric(out, options):
    return fl.LossOutput(out.loss, out.metrics | {"nll_loss": out.metrics["nll_loss"] + 1}, out.stats)


def no_metric(out, options):
    return fl.LossOutput(out.loss, {n: x for n, x in out.metrics.items() if n != "nll_loss"}, out.stats)


def refuses_packed(out, options):
    if "cu_seqlens" in options:
        raise ValueError("no packed sequences")
    return out


def detached_share(out, options):
    return fl.LossOutput(0.5 * out.loss + 0.5 * out.loss.detach(), out.metrics, out.stats)


def reads_all_rows(policy, labels, **options):
    """Compute SimPO (arXiv 2405.14734) and what ignored rows have; the metrics are those of simpo_loss."""
    out = fl.simpo_loss(policy, labels, **options)
    x = policy.hidden if isinstance(policy, fl.Hidden) else getattr(policy, "logits", getattr(policy, "logps", policy))
    return fl.LossOutput(out.loss + 0 * x.sum(), out.metrics, out.stats)


def no_words(policy, labels, **options):
    return fl.simpo_loss(policy, labels, **options)


SIMPO = FAMILY["simpo_loss"]
BROKEN = {
    "a factor": (
        changed(with_loss(lambda out, options: 2 * out.loss)),
        r"loss: is \S+, in the reference \S+; in \d+ of \d+ cases.*\n.*gradient of hidden: is 2 times that of the reference",
    ),
    "a sum": (changed(only(reduction="sum")), r"loss: .*; in 4 of 68 cases, all with reduction='sum', for example float"),
    "a count": (changed(only(num_items=7)), r"loss: .* all with num_items=7, for"),
    "a variant": (changed(only(alpha=0.25)), r"loss: .* all with the variant 'AlphaPO', for"),
    "a shape": (
        changed(with_loss(lambda out, options: out.loss.mean())),
        r"loss: has the shape \[\], that of the reference \[3\]; in 4 of 68 cases, all with reduction='none'",
    ),
    "a gradient": (changed(detached_share), "^gradient of hidden: is 0.5 times that of the reference; in"),
    "a metric": (changed(wrong_metric), r"^metrics\['nll_loss'\]: is \S+, in the reference \S+; in every case"),
    "a metric that is missing": (changed(no_metric), "^metrics: only one of the loss and the reference has nll_loss; in every"),
    "packed": (changed(refuses_packed), "^the loss: raises ValueError: no packed sequences; in .* all with packed, for"),
    "NaN": (
        replace(SIMPO, call=reads_all_rows),
        "^loss: is NaN, and in the reference it is a number; in .*, all with NaN in ignored rows, for",
    ),
    "a variant that it does not take": (
        replace(SIMPO, variants={"x": {"gama": 1.0}}),
        "^the loss: raises TypeError: fl.simpo_loss: unknown option 'gama'; did you mean 'gamma'.*; in every case, for",
    ),
    "no docstring": (replace(SIMPO, call=no_words), "docstring: say what the metrics are\ndocstring: name the source, 2405"),
    "batch": (replace(SIMPO, batch="pair"), "batch: expected one of 'tokens', 'sequences', 'pairs', 'triples', got 'pair'"),
    "inputs": (replace(SIMPO, inputs={"beta": "scalar"}), "inputs: expected one of per sequence, .* for beta, got 'scalar'"),
    "no variants": (replace(SIMPO, variants={}), "variants: expected at least one"),
    "ref": (replace(SIMPO, ref="no"), "ref: expected 'needed', 'optional' or 'unused', got 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_differs_is_said(case):
    entry, words = BROKEN[case]
    found = verify_loss(entry, fl.reference.simpo_loss, device="cpu").findings
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(found))


def test_a_loss_must_be_exported(monkeypatch):
    monkeypatch.delattr(fl, "simpo_loss")
    assert verify_loss("simpo_loss").findings == [
        "name: fused_losses has no simpo_loss; import it in fused_losses/__init__.py, and name it in __all__"
    ]


def test_a_reference_must_be_there():
    assert verify_loss(replace(SIMPO, call=reads_all_rows)).findings == [
        "reference: fused_losses.reference has no function reads_all_rows; write one, or pass `reference`"
    ]
    assert verify_loss(fl.orpo_loss, variants=["ORPO"]).ok


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("simp_loss", "loss: unknown name 'simp_loss'.*did you mean 'simpo_loss'"),
        (fl.dpo_loss, "unknown name 'dpo_loss'"),
    ],
)
def test_unknown_names(loss, words):
    with pytest.raises(ValueError, match=words):
        verify_loss(loss)
    with pytest.raises(ValueError, match="variants: unknown name 'SIMPO'"):
        verify_loss("simpo_loss", variants=["SIMPO"])


def test_batches_have_a_sequence_of_each_kind():
    for packed in (False, True):
        batch = loss_batches.LossBatch(SIMPO, "SimPO", torch.Generator().manual_seed(0), packed)
        assert batch.lead == batch.y.shape and (batch.y == -100).any() and (batch.y != -100).any()
    assert loss_batches.sources_of(SIMPO) == [("hidden", None), ("logits", None), ("log-probs", None)]


def test_beside_what_is_verified():
    assert fl.losses.verify("tdpo_loss", variants=["TDPO2"]).ok
    assert fl.divergences.verify("reverse_kl", backends=["torch"]).ok
