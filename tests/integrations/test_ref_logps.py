"""Saved log-probs of a reference: equal to those of the reference at hand, whole after an interruption, refused when stale."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import relative, seeded

import fused_losses as fl
from fused_losses.cli import demo
from fused_losses.integrations import ref_logps
from fused_losses.integrations.data import PreferenceCollator, UnpairedCollator, tokenize_preferences

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

STALE = "the log-probs are stale; delete the folder, or give another. "
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 300
COLLATOR = PreferenceCollator(0, max_length=40, truncation="keep_end")
QUIET = {"batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def text():
    pairs = demo.load_pairs(str(demo.Path(demo.__file__).parent / "data" / "preferences.jsonl"), 7)
    bpe = demo.train_tokenizer(pairs, VOCAB)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages }}"
    short = [
        (prompt[:30], chosen[: 20 + 5 * i], rejected[: 50 - 5 * i])
        for i, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    return [dict(zip(demo.COLUMNS, pair, strict=True)) for pair in short], tokenizer


@pytest.fixture(scope="module")
def rows(text):
    found = tokenize_preferences(datasets.Dataset.from_list(text[0]), text[1])
    labels = COLLATOR(list(found))["labels"]
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in found]
    assert (labels[:, 0] == -100).all() and ((labels >= 0).sum(1) > 5).all() and min(lengths) < 40 < max(lengths)
    return found


def make(seed=1, dtype=torch.float64, **options):
    seeded(seed)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, attention_dropout=0.5, **size | options)
    return transformers.LlamaForCausalLM(config).to(dtype)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False} | options
    config = peft.LoraConfig(**options)
    return peft.get_peft_model(model, config).double()


def loss(policy, ref, batch, packed=False):
    """dpo_loss of the policy's hidden states; ref is a source, or a model."""

    def source(model):
        inputs = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        hidden = fl.backbone(model)(batch["input_ids"], use_cache=False, **inputs).last_hidden_state
        return fl.find_head(model).source(hidden[0] if packed else hidden)

    if isinstance(ref, torch.nn.Module):
        with torch.no_grad():
            ref = source(ref.eval())
    more = {"cu_seqlens": batch["cu_seqlens"]} if packed else {}
    return fl.dpo_loss(source(policy.eval()), batch["labels"], ref, shift=True, **more)


# ---- equality ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_saved_and_online_losses_are_equal(tmp_path, rows, per_token, packed, listed):
    """The files are made of padded batches of two, and read by batches of three in another order."""
    reference, policy = make(1), make(2)
    dataset = list(rows) if listed else rows
    saved = ref_logps.precompute(
        reference.train(), dataset, COLLATOR, tmp_path / "ref", per_token=per_token, part_rows=3, **QUIET
    )
    assert reference.training and len(saved) == len(rows) == 7
    attached = saved.attach(dataset)
    assert type(attached) is type(dataset)
    attached = [attached[i] for i in (6, 0, 3)]
    collator = PreferenceCollator(0, max_length=40, truncation="keep_end", packed=packed)
    batch = collator(attached)
    ours = loss(policy, fl.LogProbs(batch["ref_logps"]), batch, packed)
    wanted = loss(policy, reference, batch, packed)
    torch.testing.assert_close(ours.loss, wanted.loss, rtol=1e-6, atol=0)
    parameters = list(policy.parameters())
    for a, b in zip(*(torch.autograd.grad(x.loss, parameters) for x in (ours, wanted)), strict=True):
        assert relative(a, b) < 1e-5
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)
    other = loss(policy, policy, batch, packed)  # so the comparison can fail
    assert abs(other.loss - wanted.loss) > 1e-3


def test_packed_and_padded_files_are_equal(tmp_path, rows):
    packed = PreferenceCollator(0, max_length=40, truncation="keep_end", packed=True)
    found = [
        ref_logps.precompute(make(), rows, c, tmp_path / str(i), **QUIET) for i, c in enumerate((COLLATOR, packed))
    ]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(found[0].values[name], found[1].values[name], rtol=1e-6)
    ref_logps.load(tmp_path / "0", collator=packed)  # which is none of what they depend on
    for each in (COLLATOR, packed):
        other = replace(each, label_pad=-1)
        tokens = ref_logps.precompute(make(), rows, other, tmp_path / f"{each.packed}", per_token=True, **QUIET)
        sums = [x.sum() for x in tokens.values["ref_chosen_logps"]]
        np.testing.assert_allclose(found[0].values["ref_chosen_logps"], sums, rtol=1e-6)


def test_unpaired(tmp_path, rows):
    single = [{"prompt_ids": r["prompt_ids"], "completion_ids": r["chosen_ids"], "label": True} for r in rows]
    collator, model = UnpairedCollator(0, max_length=40, truncation="keep_end", kl=True), make()
    saved = ref_logps.precompute(model, single, collator, tmp_path / "ref", **QUIET)  # the last batch is of one row
    pairs = ref_logps.precompute(model, rows, COLLATOR, tmp_path / "pairs", **QUIET)
    np.testing.assert_allclose(saved.values["ref_logps"], pairs.values["ref_chosen_logps"], rtol=1e-6)
    batch = collator(saved.attach(single)[:3])
    assert batch["ref_logps"].tolist() == saved.values["ref_logps"][:3].tolist()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}],
    ids=str,
)
def test_the_reference_of_lora_is_its_base(tmp_path, rows, options):
    """Also after the adapter has been trained; it is on again afterwards, and trains."""
    base = make()
    wanted = ref_logps.precompute(base, rows, COLLATOR, tmp_path / "base", **QUIET)
    model = lora(copy.deepcopy(base), **options)
    asks = [p.requires_grad for p in model.parameters()]
    batch = COLLATOR(list(rows)[:2])
    with torch.no_grad():
        before = model.eval()(batch["input_ids"]).logits
    saved = ref_logps.precompute(model, rows, COLLATOR, tmp_path / "lora", **QUIET)
    for name, values in wanted.values.items():
        np.testing.assert_array_equal(saved.values[name], values)
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).logits, before)
        assert not torch.allclose(base.eval()(batch["input_ids"]).logits, before)
        for p in model.parameters():
            p.add_(p.requires_grad)  # a step
    assert [p.requires_grad for p in model.parameters()] == asks
    for path, other in (("lora", model), ("lora", base), ("base", model)):
        ref_logps.load(tmp_path / path, model=other)
    model.merge_adapter()
    with pytest.raises(
        RuntimeError, match=r"^model: an adapter is merged into model\.layers\.0\.self_attn\.q_proj; unmerge"
    ):
        ref_logps.load(tmp_path / "lora", model=model)
    with pytest.raises(TypeError, match=r"^reference_model: LlamaForCausalLM has adapters, but no disable_adapter\(\)"):
        ref_logps.precompute(lora(base, **options).get_base_model(), rows, COLLATOR, tmp_path / "x", **QUIET)


# ---- interruption --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def counted(model, stop=None):
    """Rows of batches that the backbone was given."""
    seen = []

    def hook(_, args):
        if stop is not None and len(seen) == stop:
            raise Interrupted
        seen.append(len(args[0]) // 2)

    return seen, fl.backbone(model).register_forward_pre_hook(hook)


def test_an_interrupted_run_goes_on(tmp_path, rows, capsys):
    model, path = make(), tmp_path / "ref"
    whole = ref_logps.precompute(model, rows, COLLATOR, tmp_path / "whole", batch_size=7, progress=False)
    seen, hook = counted(model.train(), stop=3)
    with pytest.raises(Interrupted):
        ref_logps.precompute(model, rows, COLLATOR, path, part_rows=3, **QUIET)
    hook.remove()
    assert seen == [2, 1, 2] and model.training
    with pytest.raises(
        RuntimeError, match="has 3 of 7 rows, it was interrupted; call precompute with the same arguments"
    ):
        ref_logps.load(path)
    (path / "part-000000003.npz.tmp").write_bytes(b"half of it")
    seen, hook = counted(model)
    saved = ref_logps.precompute(model, rows, COLLATOR, path, batch_size=3)  # in other batches, and with a bar
    assert seen == [3, 1] and "Reference" in capsys.readouterr().err
    for name, values in whole.values.items():
        np.testing.assert_allclose(saved.values[name], values, rtol=1e-6)
    assert ref_logps.precompute(model, rows, COLLATOR, path, **QUIET).values.keys() == whole.values.keys()
    assert seen == [3, 1]  # all was there
    assert not list(path.glob("*.tmp")) and "Reference" not in capsys.readouterr().err


def test_a_damaged_file(tmp_path, rows):
    model = make()
    saved = ref_logps.precompute(model, rows, COLLATOR, tmp_path, part_rows=4, **QUIET)
    part = tmp_path / "part-000000004.npz"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"part-000000004\.npz: cannot be read .* delete it and call precompute"):
        ref_logps.load(tmp_path)
    part.write_bytes((tmp_path / "part-000000000.npz").read_bytes())
    with pytest.raises(RuntimeError, match=r"part-000000004\.npz: cannot be read \(expected 3 rows\)"):
        ref_logps.load(tmp_path)
    part.unlink()
    again = ref_logps.precompute(model, rows, COLLATOR, tmp_path, **QUIET)
    np.testing.assert_allclose(again.values["ref_chosen_logps"], saved.values["ref_chosen_logps"], rtol=1e-6)
    with pytest.raises(FileNotFoundError, match="^path: expected a folder that precompute has made, got .*nowhere"):
        ref_logps.load(tmp_path / "nowhere")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["fingerprint"]["data"]["rows"] == 7
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(RuntimeError, match="expected format 1, got 0"):
        ref_logps.load(tmp_path)


# ---- staleness -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, rows, text):
    """The folder; nobody writes into it."""
    path = tmp_path_factory.mktemp("saved")
    ref_logps.precompute(make(), rows, COLLATOR, path, tokenizer=text[1], **QUIET)
    return path


def test_what_is_the_same_loads(saved, rows, text):
    found = ref_logps.load(saved, model=make(), dataset=rows, tokenizer=text[1], collator=COLLATOR)
    assert found.attach(rows).column_names == [*rows.column_names, "ref_chosen_logps", "ref_rejected_logps"]
    assert found.attach(found.attach(rows)).column_names == found.attach(rows).column_names
    model = make()
    model.config.use_cache, model.config.pad_token_id = False, 0  # as trainers do
    ref_logps.load(saved, model=model)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.empty(16, VOCAB).t().copy_(model.lm_head.weight).clone())
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.t().contiguous().t())  # other strides
    ref_logps.load(saved, model=torch.compile(model))


def changed(model, name):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-12
    return model


def test_another_model_is_refused(saved):
    def refused(model, words):
        with pytest.raises(RuntimeError, match=STALE + words):
            ref_logps.load(saved, model=model)

    refused(make(2), "model: 9 weights are others, such as lm_head.weight, model.embed_tokens.weight, model.layers")
    refused(changed(make(), "lm_head.weight"), "model: 1 weights are others, such as lm_head.weight$")
    refused(make(dtype=torch.float32), "model: 12 weights are others")
    refused(make(num_hidden_layers=2), "model: 18 weights.*; config: num_hidden_layers was 1, is 2$")
    refused(make(rms_norm_eps=1e-3), "config: rms_norm_eps was 1e-06, is 0.001$")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    refused(make(rope_parameters=rope), "config: rope_parameters was .*10000.0.*, is .*500.0")
    region, moving = make(), make(3)
    region = fl.TrustRegion(region, moving, every=1)
    ref_logps.load(saved, model=region.reference)
    region.step()
    refused(region.reference, "model: 9 weights are others")


def test_a_tensor_is_hashed_in_pieces(monkeypatch):
    """Every byte counts, whatever the pieces; dtype and shape count too."""
    x = torch.arange(60, dtype=torch.bfloat16).view(4, 15)
    whole = ref_logps._content(x)
    assert whole != ref_logps._content(x.view(15, 4)) != ref_logps._content(x.view(torch.int16).view(15, 4))
    seen = []
    real = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: seen.append(self.nbytes) or real(self))
    monkeypatch.setattr(ref_logps, "CHUNK", 64)
    assert ref_logps._content(x) == whole and seen == [60, 60]
    assert ref_logps._content(x.t().contiguous().t()) == whole
    for i in (0, 29, 30, 59):
        y = x.clone()
        y.view(-1)[i] += 1
        assert ref_logps._content(y) != whole, i
    assert ref_logps._content(torch.tensor(3.0)) != ref_logps._content(torch.tensor(4.0))
    assert ref_logps._content(torch.zeros(0)) != ref_logps._content(torch.zeros(0, 2))


def test_tied_weights_are_read_once(monkeypatch):
    model, seen = make(tie_word_embeddings=True), []
    real = ref_logps._content
    monkeypatch.setattr(ref_logps, "_content", lambda x: seen.append(x.shape) or real(x))
    found = ref_logps._weights(model, None)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] and len(seen) == len(found) - 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m.to("meta"), r"^model: \S+ is on the meta device"),
        (lambda m: setattr(m.lm_head.weight, "data", torch.zeros(0)), r"^model: lm_head\.weight has the shape \[0\] here"),
        (lambda m: setattr(m.lm_head.weight, "ds_id", 3), r"^model: lm_head\.weight has the shape .* ZeRO-3 or FSDP"),
        (lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(DTensor(3, 4))), r"^model: lm_head\.weight is a DTensor"),
        (
            lambda m: setattr(m.lm_head.weight, "__tensor_flatten__", 1),
            r"^model: lm_head\.weight is a Parameter, whose bytes are elsewhere: take the fingerprint of a model that is whole",
        ),
    ],
)  # fmt: skip
def test_weights_that_are_not_here_are_refused(saved, spoil, words):
    model = make()
    spoil(model)
    with pytest.raises(ValueError, match=words):
        ref_logps.load(saved, model=model)


class DTensor(torch.Tensor):
    pass


def test_other_rows_are_refused(saved, rows):
    def refused(dataset, words):
        for act in (
            lambda: ref_logps.load(saved, dataset=dataset),
            lambda: ref_logps.load(saved).attach(dataset),
            lambda: ref_logps.precompute(make(), dataset, COLLATOR, saved, **QUIET),
        ):
            with pytest.raises(RuntimeError, match=STALE + words):
                act()

    refused(rows.select(range(6)), "data: had 7 rows, has 6$")
    refused(rows.shuffle(seed=0), "data: the same rows in another order$")
    listed = list(rows)
    moved = {
        "prompt_ids": listed[3]["prompt_ids"] + listed[3]["chosen_ids"][:1],
        "chosen_ids": listed[3]["chosen_ids"][1:],
    }
    refused([*listed[:3], listed[3] | moved, *listed[4:]], "data: token ids of some rows are others$")
    refused([*listed[:6], listed[5]], "data: token ids of some rows are others$")
    ref_logps.load(saved, dataset=[row | {"chosen": "text does not count"} for row in listed])


def test_streams_are_refused(tmp_path, saved, rows):
    stream = rows.to_iterable_dataset()
    for act in (
        lambda: ref_logps.precompute(make(), stream, COLLATOR, tmp_path, **QUIET),
        lambda: ref_logps.load(saved, dataset=stream),
        lambda: ref_logps.load(saved).attach(stream),
    ):
        with pytest.raises(
            TypeError, match="^dataset: expected rows that can be counted .* got IterableDataset; a stream"
        ):
            act()
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(saved, text, rows, tmp_path):
    def refused(words, **change):
        options = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": "{{ messages }}"} | change
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=text[1].backend_tokenizer, **options)
        with pytest.raises(
            RuntimeError,
            match=STALE + "tokenizer: " + words + "$",
        ):
            ref_logps.load(saved, tokenizer=made)

    refused("another chat template", chat_template="{{ tools }}")
    refused("another special tokens", pad_token="<eos>")
    refused("another vocabulary and special tokens", eos_token="<end>")
    ref_logps.precompute(make(), rows, COLLATOR, tmp_path, **QUIET)
    with pytest.raises(
        RuntimeError, match="another. tokenizer: no fingerprint was saved, for precompute was not given one"
    ):
        ref_logps.load(tmp_path, tokenizer=text[1])


def test_another_truncation_is_refused(saved, rows):
    def refused(collator, words):
        for act in (
            lambda: ref_logps.load(saved, collator=collator),
            lambda: ref_logps.precompute(make(), rows, collator, saved, **QUIET),
        ):
            with pytest.raises(RuntimeError, match=STALE + words):
                act()

    refused(PreferenceCollator(0, 39, "keep_end"), "collator: max_length was 40, is 39$")
    refused(PreferenceCollator(0, 40, "keep_start"), "collator: truncation was 'keep_end', is 'keep_start'$")
    with pytest.raises(RuntimeError, match="another. collator: columns was"):
        ref_logps.load(saved, collator=UnpairedCollator(0, 40, "keep_end"))
    with pytest.raises(RuntimeError, match=r"stale.*model: 9 weights .*; collator: .*; data: .* another order"):
        ref_logps.load(
            saved, model=make(2), dataset=rows.shuffle(seed=0), collator=PreferenceCollator(0, 7, "keep_end")
        )


def test_refused_arguments(tmp_path, saved, rows):
    model = make()
    with pytest.raises(RuntimeError, match="was made with per_token=False, asked for True"):
        ref_logps.precompute(model, rows, COLLATOR, saved, per_token=True, **QUIET)
    with pytest.raises(ValueError, match="^batch_size: expected an int >= 1, got 0"):
        ref_logps.precompute(model, rows, COLLATOR, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="^part_rows: expected an int >= 1, got 0"):
        ref_logps.precompute(model, rows, COLLATOR, tmp_path, part_rows=0, **QUIET)
    with pytest.raises(ValueError, match="^dataset: expected at least one row, got none"):
        ref_logps.precompute(model, [], COLLATOR, tmp_path, **QUIET)
    with pytest.raises(TypeError, match="^collator: expected a PreferenceCollator or UnpairedCollator .* got function"):
        ref_logps.precompute(model, rows, lambda rows: rows, tmp_path, **QUIET)


# ---- another adapter as the reference ------------------------------------------------------------------------------------


def two_adapters(**options):
    made = lora(make(1))
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, **options)
    made.add_adapter("ref", config)
    return made.double()


def test_an_adapter_is_the_reference(tmp_path, rows):
    model = two_adapters()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    saved = ref_logps.precompute(model, rows, COLLATOR, tmp_path / "ref", adapter="ref", **QUIET)
    assert model.active_adapters == ["default"]
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    whole = copy.deepcopy(model)
    whole.set_adapter("ref")
    merged = whole.merge_and_unload()
    wanted = ref_logps.precompute(merged, rows, COLLATOR, tmp_path / "merged", **QUIET)
    base = ref_logps.precompute(model, rows, COLLATOR, tmp_path / "base", **QUIET)
    for name, values in saved.values.items():
        np.testing.assert_allclose(values, wanted.values[name], rtol=1e-6)
        assert np.abs(values - base.values[name]).max() > 1e-3


def test_the_fingerprint_is_that_of_the_adapter(tmp_path, rows):
    model = two_adapters()
    ref_logps.precompute(model, rows, COLLATOR, tmp_path, adapter="ref", **QUIET)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in trained.named_parameters():
            if ".default." in n:
                p.add_(1)
    ref_logps.load(tmp_path, model=trained)  # which is none of the reference
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in moved.named_parameters() if "lora_B.ref" in n).add_(1e-3)
    for other, options, words in (
        (moved, {}, r"stale.*model: 1 weights are others, such as .*lora_B"),
        (model, {"adapter": "default"}, "stale.*model: .* weights are others"),
        (two_adapters(lora_alpha=3), {}, "config: adapter's lora_alpha was 8, is 3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ref_logps.load(tmp_path, model=other, **options)
    with pytest.raises(RuntimeError, match="stale"):
        ref_logps.precompute(model, rows, COLLATOR, tmp_path, **QUIET)  # with no adapter
    for other, words in (
        (model, r"adapter: expected the name of an adapter, got 'old'; the model has 'default', 'ref'"),
        (make(1), r"adapter: expected the name of an adapter, got 'old'; the model has no adapters"),
    ):
        with pytest.raises(ValueError, match=words):
            ref_logps.precompute(other, rows, COLLATOR, tmp_path / "new", adapter="old", **QUIET)
