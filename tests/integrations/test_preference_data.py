"""Preference data: tokens, truncation and masks beside TRL's own, packed and padded batches through a model, refusals."""

from __future__ import annotations

import importlib
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import seeded

import fused_losses as fl
from fused_losses.cli import demo
from fused_losses.integrations.data import (
    PreferenceCollator,
    UnpairedCollator,
    tokenize_preferences,
    tokenize_unpaired,
)

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

PAIRS = demo.Path(demo.__file__).parent / "data" / "preferences.jsonl"
CHAT = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% if mood %}<mood>{{ mood }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ think }}{% endif %}"
)
THINKING = CHAT.replace("{{ think }}", "<think></think>")  # which the conversation does not have
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
]


@pytest.fixture(scope="module")
def texts():
    pairs = demo.load_pairs(str(PAIRS), 40)
    rows = [dict(zip(demo.COLUMNS, pair, strict=True)) for pair in pairs]
    rows[0]["chosen"] += "<eos>"  # is not added twice
    return rows


@pytest.fixture(scope="module")
def tokenizer(texts):
    bpe = demo.train_tokenizer([tuple(row.values()) for row in texts], 400)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def chat(row, implicit=False, **more):
    user, *answers = [
        [{"role": role, "content": text}]
        for role, text in zip(("user", "assistant", "assistant"), row.values(), strict=True)
    ]
    if implicit:
        return {"chosen": user + answers[0], "rejected": user + answers[1]} | more
    return {"prompt": user, "chosen": answers[0], "rejected": answers[1]} | more


def trls(dataset, tokenizer, max_length=None, truncation="keep_start", kind="DPO"):
    """Rows of TRL's own pipeline."""
    trainer = getattr(pytest.importorskip(f"trl.trainer.{kind.lower()}_trainer"), f"{kind}Trainer")
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation)
    args.per_device_train_batch_size = 4
    me = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    importlib.import_module("accelerate").PartialState()
    return trainer._prepare_dataset(me, dataset, tokenizer, args, "train")


def columns(rows, names=IDS):
    return [[row[name] for name in names] for row in rows]


FORMS = {
    "text": lambda row: row,
    "text, implicit prompt": lambda row: {k: row["prompt"] + " " + row[k] for k in ("chosen", "rejected")},
    "chat": chat,
    "chat, implicit prompt": lambda row: chat(row, implicit=True),
    "chat, tools": lambda row: chat(row, tools='[{"name": "f"}]', chat_template_kwargs={"mood": "calm"}),
}


@pytest.mark.filterwarnings("ignore:tokenizer")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_tokens_and_batches_are_trls(texts, tokenizer, form, truncation):
    rows = [FORMS[form](row) for row in texts]
    limit = sorted(len(row["prompt_ids"]) for row in tokenize_preferences(rows, tokenizer))[-3]
    dataset = datasets.Dataset.from_list(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trls(dataset, tokenizer, limit, truncation)
        ours = tokenize_preferences(dataset, tokenizer, max_length=limit, truncation=truncation)
        listed = tokenize_preferences(rows, tokenizer, max_length=limit, truncation=truncation)
        stream = tokenize_preferences(dataset.to_iterable_dataset(), tokenizer, max_length=limit, truncation=truncation)
    assert isinstance(ours, datasets.Dataset) and isinstance(stream, datasets.IterableDataset)
    assert columns(ours) == columns(theirs) == columns(listed) == columns(stream)
    assert len(texts) - len(ours) == (3 if truncation == "keep_start" else 0)
    collate = importlib.import_module("trl.trainer.dpo_trainer").DataCollatorForPreference
    options = {"max_length": limit, "pad_to_multiple_of": 8}
    wanted = collate(tokenizer.pad_token_id, truncation_mode=truncation, **options)(list(theirs))
    batch = PreferenceCollator(tokenizer.pad_token_id, truncation=truncation, **options)(list(ours))
    assert batch.keys() == wanted.keys() | {"labels"}
    assert any(len(p) + max(len(c), len(r)) > limit for p, c, r in columns(ours))
    for name, x in wanted.items():
        assert torch.equal(batch[name], x) and batch[name].dtype == x.dtype, name
    assert torch.equal(batch["labels"], batch["input_ids"].where(wanted["completion_mask"] == 1, -100))


@pytest.mark.filterwarnings("ignore:tokenizer")
@pytest.mark.parametrize("form", ["text", "chat"])
def test_unpaired_tokens_and_batches_are_trls(texts, tokenizer, form):
    rows = [FORMS[form](row) for row in texts[:8]]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 == 0} for i, row in enumerate(rows)]
    dataset = datasets.Dataset.from_list(rows)
    theirs = trls(dataset, tokenizer, 70, kind="KTO")
    ours = tokenize_unpaired(dataset, tokenizer, max_length=70)
    assert columns(ours, ["prompt_ids", "completion_ids"]) == columns(theirs, ["prompt_ids", "completion_ids"])
    collate = importlib.import_module("trl.trainer.kto_trainer").DataCollatorForUnpairedPreference
    wanted = collate(0, max_length=70)(list(theirs)[:4])  # its KL completions are rotated within four rows
    batch = UnpairedCollator(0, max_length=70, kl=True)(list(ours)[:4])
    assert torch.equal(batch["desirable"], wanted["label"])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(batch[name], wanted[name]) and torch.equal(batch["kl"][name], wanted[f"KL_{name}"]), name


def test_the_completion_starts_where_tokens_differ(texts, tokenizer):
    """The template's generation prompt ends with what the conversation does not have."""
    dataset = datasets.Dataset.from_list([chat(row) for row in texts[:3]])
    thinking = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=THINKING
    )
    with pytest.warns(UserWarning, match="^tokenizer: some prompts are tokenised otherwise alone than before"):
        ours = tokenize_preferences(list(dataset), thinking)
    assert columns(ours) == columns(trls(dataset, thinking))
    text = ["".join(thinking.convert_ids_to_tokens(row["prompt_ids"] + row["chosen_ids"])) for row in ours]
    assert "<assistant>" in text[0] and not any("think" in x for x in text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = tokenize_preferences(list(dataset), tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(plain[0]["prompt_ids"])).endswith("<eos>Ċ<assistant>")


@pytest.mark.filterwarnings("ignore:tokenizer")
def test_the_completion_starts_with_the_sooner_difference(tokenizer):
    """Of the two completions one alone merges with the end of the prompt."""
    row = {"prompt": "I like th", "chosen": "e sea", "rejected": " mud"}
    found = [
        tokenize_preferences([row | dict.fromkeys(("chosen", "rejected"), row[k])], tokenizer) for k in list(row)[1:]
    ]
    merged, whole = (len(rows[0]["prompt_ids"]) for rows in found)
    assert merged < whole
    for swapped in (row, row | {"chosen": row["rejected"], "rejected": row["chosen"]}):
        ours = tokenize_preferences([swapped], tokenizer)
        assert columns(ours) == columns(trls(datasets.Dataset.from_list([swapped]), tokenizer))
        assert len(ours[0]["prompt_ids"]) == merged


def test_no_tools_are_none(tokenizer, texts):
    """Where a template would render an empty list of them."""
    renders = CHAT.replace("{% if tools %}", "{% if tools is not none %}")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=renders
    )
    plain, *others = (
        columns(tokenize_preferences([chat(texts[0], **more)], made)) for more in ({}, {"tools": []}, {"tools": "[]"})
    )
    assert others == [plain, plain]
    assert columns(tokenize_preferences([chat(texts[0], tools=[{"name": "f"}])], made)) != plain


def test_long_prompts(texts, tokenizer):
    full = tokenize_preferences(texts, tokenizer)
    limit = sorted(len(row["prompt_ids"]) for row in full)[-3]
    with pytest.warns(UserWarning, match=f"^max_length: 3 of 40 rows are left out, their prompts have {limit} tokens"):
        assert len(tokenize_preferences(texts, tokenizer, max_length=limit)) == 37
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = tokenize_preferences(texts, tokenizer, max_length=limit, max_prompt_length=4)
    assert [row["prompt_ids"] for row in short] == [row["prompt_ids"][-4:] for row in full]
    assert [row["chosen_ids"] for row in short] == [row["chosen_ids"] for row in full]
    two = tokenize_preferences(datasets.Dataset.from_list(texts), tokenizer, num_proc=2)
    assert columns(two) == columns(full)


def test_implicit_prompts():
    """Of strings: without a space at the end, and something is left of both."""
    from fused_losses.integrations.data import _texts

    def split(chosen, rejected):
        return tuple(_texts({"chosen": chosen, "rejected": rejected}, ("chosen", "rejected")).values())

    assert split("hi you all", "hi me") == ("hi", " you all", " me")
    assert split("ab", "abc") == ("a", "b", "bc")
    assert split("x ", "y") == ("", "x ", "y")
    assert split("", "y") == ("", "", "y")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "chosen": "b"}], "^dataset: expected the columns .* a row lacks rejected"),
        ([{"prompt": "a", "chosen": [{}], "rejected": "b"}], "^dataset: .* got prompt str, chosen list, rejected str"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "images": [1]}], "^dataset: has images, expected text alone"),
        ("text", "^dataset: expected one datasets.Dataset, IterableDataset or list of dicts, got str"),
        (datasets.DatasetDict(), "^dataset: expected one .* got DatasetDict"),
    ],
)
def test_refused_rows(tokenizer, rows, words):
    with pytest.raises((TypeError, ValueError), match=words):
        tokenize_preferences(rows, tokenizer)


def test_refused_tokenisation(tokenizer, texts):
    with pytest.raises(TypeError, match="^tokenizer: expected a tokenizer of transformers, got str"):
        tokenize_preferences(texts, "gpt2")
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="^tokenizer: has no eos_token"):
        tokenize_preferences(texts, endless)
    with pytest.raises(ValueError, match="^num_proc: is for a datasets.Dataset, got 2 and a list"):
        tokenize_preferences(texts, tokenizer, num_proc=2)
    stream = datasets.Dataset.from_list(texts).to_iterable_dataset()
    with pytest.raises(ValueError, match="^num_proc: a streaming dataset is read by one process, got 2"):
        tokenize_preferences(stream, tokenizer, num_proc=2)
    with pytest.raises(ValueError, match="^truncation: expected 'keep_start' or 'keep_end', got 'middle'"):
        tokenize_preferences(texts, tokenizer, truncation="middle")
    with pytest.raises(ValueError, match="^max_prompt_length: expected an int >= 1 or None, got 0"):
        tokenize_preferences(texts, tokenizer, max_prompt_length=0)


# ---- collators -----------------------------------------------------------------------------------------------------------


def test_padded_batch():
    collator = pickle.loads(pickle.dumps(PreferenceCollator(0, label_pad=-1)))  # as workers of a DataLoader get it
    batch = collator(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 12]]
    assert batch["labels"].tolist() == [
        [-1, -1, -1, 4, 5],
        [-1, -1, 9, -1, -1],
        [-1, -1, -1, 6, -1],
        [-1, -1, 10, 11, 12],
    ]
    assert batch["attention_mask"].tolist()[1:3] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_packed_batch():
    batch = PreferenceCollator(0, packed=True, max_length=4)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 7, 8, 9, 1, 2, 3, 6, 7, 8, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]]
    m = -100
    assert batch["labels"].tolist() == [m, m, m, 4, m, m, 9, m, m, m, 6, m, m, 10, 11]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 11, 15] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_length"] == 4


def test_truncation_at_the_start():
    batch = PreferenceCollator(0, max_length=3, truncation="keep_end")(ROWS)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [7, 8, 9], [2, 3, 6], [10, 11, 12]]
    assert batch["labels"].tolist() == [[-100, 4, 5], [-100, -100, 9], [-100, -100, 6], [10, 11, 12]]


@pytest.mark.parametrize("per_token", [False, True])
def test_packed_and_padded_have_one_loss(per_token):
    """Through a model, with saved log-probs of the reference; the sequences of a packed batch do not see each other."""
    seeded(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **size)).double()
    head, body = fl.find_head(model), fl.backbone(model)
    saved = [[[-1.0, -2.0], [-3.0]], [[-0.5], [-1.5, -2.5, -3.5]]]  # of each row: chosen, rejected
    names = ("ref_chosen_logps", "ref_rejected_logps")
    saved = [[x if per_token else sum(x) for x in row] for row in saved]
    rows = [row | dict(zip(names, x, strict=True)) for row, x in zip(ROWS, saved, strict=True)]
    found = []
    for packed in (False, True):
        batch = PreferenceCollator(0, packed=packed)(rows)
        if packed:
            hidden = body(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state[0]
        else:
            hidden = body(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        out = head(
            hidden,
            batch["labels"],
            fl.LogProbs(batch["ref_logps"]),
            loss=fl.dpo_loss,
            shift=True,
            beta=0.5,
            **({"cu_seqlens": batch["cu_seqlens"]} if packed else {}),
        )
        found.append((out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))))
        if per_token:
            assert batch["ref_logps"].shape == (out.stats.logps.shape if packed else (4, 4))
            assert batch["ref_logps"].sum() == -14 and not batch["ref_logps"][~out.stats.mask].any()
        else:
            assert batch["ref_logps"].tolist() == [-3, -0.5, -3, -7.5]
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # and the loss is the one of logits and sums
        batch = PreferenceCollator(0)(rows)
        logps = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        y, mask = batch["labels"][:, 1:], batch["completion_mask"][:, 1:]
        sums = (logps.gather(-1, y.clamp(min=0)[..., None])[..., 0] * mask).sum(1) - torch.tensor([-3, -0.5, -3, -7.5])
        loss = -torch.nn.functional.logsigmoid(0.5 * (sums[:2] - sums[2:])).mean()
    torch.testing.assert_close(found[0][0], loss, rtol=1e-6, atol=0)


def test_unpaired_batch():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3 + i] * (i + 1), "label": i == 1} for i in range(3)]
    rows = [row | {"ref_logps": float(-i)} for i, row in enumerate(rows)]
    batch = UnpairedCollator(0, kl=True)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 4, 4, 0], [1, 2, 5, 5, 5]]
    assert batch["kl"]["input_ids"].tolist() == [[1, 2, 5, 5, 5], [1, 2, 3, 0, 0], [1, 2, 4, 4, 0]]
    assert batch["desirable"].tolist() == [False, True, False] and batch["ref_logps"].tolist() == [0, -1, -2]
    logits = torch.randn(3, 5, 8)
    ref = fl.LogProbs(batch["ref_logps"])
    assert fl.kto_loss(logits, batch["labels"], ref, batch["desirable"], shift=True).loss.isfinite()
    assert fl.kto_baseline(logits, batch["kl"]["labels"], torch.randn(3, 5, 8), shift=True).isfinite()
    assert "kl" not in UnpairedCollator(0)(rows)
    with pytest.raises(ValueError, match="^kl: expected two rows or more"):
        UnpairedCollator(0, kl=True)(rows[:1])
    with pytest.raises(ValueError, match="^label: expected True or False in each row, got 'good'"):
        UnpairedCollator(0)([rows[0] | {"label": "good"}])


@pytest.mark.parametrize(
    ("options", "rows", "words"),
    [
        ({"max_length": 3}, ROWS, r"^rows: row 0 of the batch, 3 \+ 2 tokens, has nothing of chosen_ids left .* max_length=3"),
        ({}, [ROWS[0] | {"rejected_ids": []}], r"^rows: row 0 of the batch, 3 \+ 0 tokens, has nothing of rejected_ids"),
        ({}, [ROWS[0] | {"prompt_ids": []}], "has nothing of rejected_ids left"),  # its first token has no logits
        ({}, [{"input_ids": [1]}], r"^rows: expected the columns \['prompt_ids', .* \(tokenize_preferences makes them\)"),
        ({}, [], "^rows: expected at least one, got none"),
        ({}, [ROWS[0] | {"ref_chosen_logps": 1.0}], "^rows: expected ref_chosen_logps and ref_rejected_logps .* got 1 of 2"),
        (
            {"max_length": 4},
            [ROWS[0] | {"ref_chosen_logps": [1.0, 2.0], "ref_rejected_logps": [1.0]}],
            r"^rows: expected 1 saved reference log-probs, .* got \[2\]: they were made with another truncation",
        ),
    ],
)  # fmt: skip
def test_refused_batches(options, rows, words):
    with pytest.raises(ValueError, match=words):
        PreferenceCollator(0, **options)(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pad_token_id": None}, "^pad_token_id: expected an int, got None; .* eos_token_id will do"),
        ({"max_length": 0}, "^max_length: expected an int >= 1 or None, got 0"),
        ({"truncation": "start"}, "^truncation: expected 'keep_start' or 'keep_end', got 'start'"),
        ({"packed": True, "pad_to_multiple_of": 8}, "^pad_to_multiple_of: packed sequences have no padding, got 8"),
        ({"pad_to_multiple_of": True}, "^pad_to_multiple_of: expected an int >= 1 or None, got True"),
        ({"label_pad": 0}, "^label_pad: expected a number that is no token id, so < 0, got 0"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        PreferenceCollator(**{"pad_token_id": 0} | options)
