"""Prepare data for preference training: tokenise rows of text, and make batches for the losses from rows of token ids.

    rows = data.tokenize_preferences(dataset, tokenizer, max_length=1024)
    collator = data.PreferenceCollator(tokenizer.pad_token_id, max_length=1024)
    for batch in DataLoader(rows, batch_size=8, collate_fn=collator):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        out, _ = fl.at_head(model, lambda p: fl.dpo_loss(p, batch["labels"], ref, shift=True), **inputs)

Columns, tokens, truncation and masks are those of TRL 1.16, so the same datasets work with both libraries. Only text is
supported, no images.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.layout import shift_packed, shifted_labels

__all__ = ["PreferenceCollator", "UnpairedCollator", "tokenize_preferences", "tokenize_unpaired"]

CUTS: dict[str, Callable[[int], slice]] = {
    "keep_start": lambda n: slice(None, n),
    "keep_end": lambda n: slice(-n, None),
}


# ---- from text to token ids ----------------------------------------------------------------------------------------------


def tokenize_preferences(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation: str = "keep_start",
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
) -> Any:
    """Return the rows with three more columns, lists of token ids: prompt_ids, chosen_ids, rejected_ids.

    The dataset has these columns:

        prompt, chosen, rejected    strings, or all of them lists of messages {"role", "content"}
        chosen, rejected            without a prompt column, the prompt is their longest common beginning (without a space
        at
                                    its end) that leaves something of both; for messages: the turns that they share
        tools, chat_template_kwargs optional: for the chat template; tools may be JSON, and an empty list means no tools

    For strings, the tokenizer's EOS is added to completions that do not end with it. For messages, the chat template ends
    them. Prompt and completion are tokenised together. The completion starts at the first token where the result differs
    from the tokens of the prompt alone, for chosen or rejected, whichever differs first. A warning is given where this
    position is inside the prompt.

    Args:
        dataset: A datasets.Dataset, a streaming IterableDataset, or a list of dicts. The result is of the same kind.
        tokenizer: A tokenizer of transformers.
        max_length: The max_length of the collator, in tokens, or None. The collator truncates; this function leaves out
            rows whose prompt fills max_length, with a warning, because "keep_start" would keep nothing of their
            completion.
        truncation: The truncation of the collator, "keep_start" or "keep_end".
        max_prompt_length: Only this number of tokens at the end of a prompt is kept, with or without BOS. None keeps all.
        num_proc: The number of processes of datasets.Dataset.map, or None.

    Raises TypeError or ValueError, which name the argument or the column.
    """
    return _tokenized(dataset, tokenizer, ("chosen", "rejected"), max_length, truncation, max_prompt_length, num_proc)


def tokenize_unpaired(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation: str = "keep_start",
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
) -> Any:
    """Return the rows prompt, completion, label (True: desirable) with the columns prompt_ids and completion_ids.

    All arguments have the same meaning as in tokenize_preferences.
    """
    return _tokenized(dataset, tokenizer, ("completion",), max_length, truncation, max_prompt_length, num_proc)


def _tokenized(
    dataset: Any,
    tokenizer: Any,
    answers: tuple[str, ...],
    max_length: int | None,
    truncation: str,
    max_prompt_length: int | None,
    num_proc: int | None,
) -> Any:
    """Tokenise all rows, and leave out those whose prompt fills max_length."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token"):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer: expected a tokenizer of transformers, got {kind}; of a processor its .tokenizer")
    _check_truncation(max_length, truncation)
    _check_count("max_prompt_length", max_prompt_length)
    how = {"tokenizer": tokenizer, "answers": answers, "max_prompt_length": max_prompt_length}
    room = {"max_length": max_length if truncation == "keep_start" else None}
    if isinstance(dataset, list | tuple):
        if num_proc is not None:
            raise ValueError(f"num_proc: is for a datasets.Dataset, got {num_proc!r} and a {type(dataset).__name__}")
        rows: Any = [{**row, **_tokenize_row(row, **how)} for row in dataset]
        kept: Any = [row for row in rows if _has_room(row, **room)]
    elif not callable(getattr(dataset, "map", None)) or isinstance(dataset, Mapping):
        kind = type(dataset).__name__
        raise TypeError(f"dataset: expected one datasets.Dataset, IterableDataset or list of dicts, got {kind}")
    elif hasattr(dataset, "__len__"):
        rows = dataset.map(_tokenize_row, fn_kwargs=how, num_proc=num_proc, desc="Tokenizing")
        kept = rows.filter(_has_room, fn_kwargs=room, num_proc=num_proc, desc="Long prompts")
    else:
        if num_proc is not None:
            raise ValueError(f"num_proc: a streaming dataset is read by one process, got {num_proc!r}")
        rows = dataset.map(_tokenize_row, fn_kwargs=how)
        return rows.filter(_has_room, fn_kwargs=room)
    if len(kept) < len(rows):
        warnings.warn(
            f"max_length: {len(rows) - len(kept)} of {len(rows)} rows are left out, their prompts have {max_length} tokens or "
            "more",
            stacklevel=3,
        )
    return kept


def _has_room(row: Mapping[str, Any], max_length: int | None) -> bool:
    """Return whether a prompt is shorter than max_length."""
    return max_length is None or len(row["prompt_ids"]) < max_length


def _tokenize_row(
    row: Mapping[str, Any], tokenizer: Any, answers: tuple[str, ...], max_prompt_length: int | None
) -> dict[str, list[int]]:
    """Return the token ids of a row's prompt and of each of its completions."""
    texts = _texts(row, answers)
    kinds = {type(text) for text in texts.values()}
    if kinds != {str} and kinds != {list}:
        got = ", ".join(f"{name} {type(text).__name__}" for name, text in texts.items())
        raise TypeError(f"dataset: expected columns that are all strings or all lists of messages, got {got}")
    if kinds == {str}:
        eos = tokenizer.eos_token
        if not eos:
            raise ValueError("tokenizer: has no eos_token, and completions of plain text would have no end")
        for name in answers:
            texts[name] += "" if texts[name].endswith(eos) else eos
        prompt = tokenizer(text=texts["prompt"])["input_ids"]
        whole = [tokenizer(text=texts["prompt"] + texts[name])["input_ids"] for name in answers]
    else:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        how = {"tools": tools or None, **(row.get("chat_template_kwargs") or {}), "tokenize": True, "return_dict": True}
        prompt = tokenizer.apply_chat_template(texts["prompt"], add_generation_prompt=True, **how)["input_ids"]
        chats = [texts["prompt"] + texts[name] for name in answers]
        whole = [tokenizer.apply_chat_template(chat, **how)["input_ids"] for chat in chats]
    start = min(_common(prompt, ids) for ids in whole)
    if start < len(prompt):
        warnings.warn(
            "tokenizer: some prompts are tokenised otherwise alone than before their completions: tokens merge across the "
            "boundary, or the chat template renders them otherwise. Their ends are left out where they differ",
            stacklevel=2,
        )
    kept = prompt[:start] if max_prompt_length is None else prompt[:start][-max_prompt_length:]
    return {"prompt_ids": kept, **{f"{name}_ids": ids[start:] for name, ids in zip(answers, whole, strict=True)}}


def _texts(row: Mapping[str, Any], answers: tuple[str, ...]) -> dict[str, Any]:
    """Return prompt and answers; where there is no prompt column, the prompt is split off the answers."""
    if row.get("images") is not None or row.get("image") is not None:
        raise ValueError("dataset: has images, expected text alone")
    texts = {name: row[name] for name in ("prompt", *answers) if row.get(name) is not None}
    if "prompt" not in texts and len(answers) == 2 and len(texts) == 2:
        pair = [texts[name] for name in answers]
        shared, most = _common(*pair), min(map(len, pair)) - 1
        if shared > most:
            shared = max(most, 0)
        elif shared and pair[0][shared - 1] == " ":
            shared -= 1
        others = [name for name, x in row.items() if name not in answers and isinstance(x, str | list) and x]
        if not shared and others:
            raise ValueError(
                "dataset: expected a column prompt, or chosen and rejected that begin with it; these begin differently, and "
                f"the other columns are {', '.join(others)}: rename the one that is the prompt"
            )
        texts = {"prompt": pair[0][:shared], **{name: text[shared:] for name, text in texts.items()}}
    if missing := [name for name in ("prompt", *answers) if name not in texts]:
        raise ValueError(f"dataset: expected the columns {('prompt', *answers)}, a row lacks {', '.join(missing)}")
    return texts


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common beginning of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# ---- from token ids to batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Collator:
    """Make batches from rows of token ids; a sequence is the row's prompt and one of its completions."""

    columns: ClassVar[dict[str, str]]  # columns of completions: columns of their saved reference log-probs
    made_by: ClassVar[str]

    pad_token_id: int
    max_length: int | None = None
    truncation: str = "keep_start"
    packed: bool = field(default=False, kw_only=True)
    pad_to_multiple_of: int | None = field(default=None, kw_only=True)
    label_pad: int = field(default=-100, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int):
            simple = self.pad_token_id is None or isinstance(self.pad_token_id, bool | float | str)
            got = repr(self.pad_token_id) if simple else type(self.pad_token_id).__name__
            raise TypeError(
                f"pad_token_id: expected an int, got {got}; pass "
                "tokenizer.pad_token_id; where a tokenizer has none its eos_token_id will "
                "do, for padding is masked"
            )
        _check_truncation(self.max_length, self.truncation)
        _check_count("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.packed and self.pad_to_multiple_of is not None:
            raise ValueError(f"pad_to_multiple_of: packed sequences have no padding, got {self.pad_to_multiple_of}")
        if self.label_pad >= 0:
            raise ValueError(f"label_pad: expected a number that is no token id, so < 0, got {self.label_pad}")

    def settings(self) -> dict[str, Any]:
        """Return the settings on which the log-probs of a sequence depend."""
        return {"columns": list(self.columns), "max_length": self.max_length, "truncation": self.truncation}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of these rows, with ref_logps where the rows have saved reference log-probs."""
        pairs = self._pairs(rows)
        batch, names = self._batch(pairs), list(self.columns.values())
        saved = [row[name] for name in names for row in rows if row.get(name) is not None]
        if saved and len(saved) < len(pairs):
            has = f"{len(saved)} of {len(pairs)} numbers"
            raise ValueError(f"rows: expected {' and '.join(names)} in all rows of a batch or in none, got {has}")
        if saved:
            batch["ref_logps"] = self._ref_logps(batch, [y for _, y in pairs], saved)
        return batch

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch without the entries for the loss: ref_logps, desirable, kl."""
        return self._batch(self._pairs(rows))

    def _pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        if wrong := next((row for row in rows if not {"prompt_ids", *self.columns} <= row.keys()), None):
            wanted = ["prompt_ids", *self.columns]
            raise ValueError(f"rows: expected the columns {wanted} ({self.made_by} makes them), got {list(wrong)}")
        if not rows:
            raise ValueError("rows: expected at least one, got none")
        return [self._sequence(i, row, row[name], name) for name in self.columns for i, row in enumerate(rows)]

    def _sequence(self, i: int, row: Mapping[str, Any], completion: Any, name: str) -> tuple[Tensor, Tensor]:
        """Return token ids and labels [L] of one sequence, truncated."""
        prompt, answer = (torch.as_tensor(x, dtype=torch.long) for x in (row["prompt_ids"], completion))
        ids, labels = torch.cat([prompt, answer]), torch.cat([torch.full_like(prompt, self.label_pad), answer])
        if self.max_length is not None:
            cut = CUTS[self.truncation](self.max_length)
            ids, labels = ids[cut], labels[cut]
        if not (labels[1:] != self.label_pad).any():
            raise ValueError(
                f"rows: row {i} of the batch, {len(prompt)} + {len(answer)} tokens, has nothing of {name} left to predict "
                f"with max_length={self.max_length}, truncation={self.truncation!r}; {self.made_by}(max_length=...) leaves "
                "rows with such prompts out"
            )
        return ids, labels

    def _batch(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        ids, labels = [list(side) for side in zip(*pairs, strict=True)]
        if self.packed:
            lengths = torch.tensor([len(x) for x in ids])
            return {
                "input_ids": torch.cat(ids)[None],
                "position_ids": torch.cat([torch.arange(len(x)) for x in ids])[None],
                "labels": torch.cat(labels),
                "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
                "max_length": int(lengths.max()),
            }
        padded = self._padded(labels, self.label_pad)
        return {
            "input_ids": self._padded(ids, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(x) for x in ids], 0),
            "labels": padded,
            "completion_mask": (padded != self.label_pad).long(),
        }

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        length, multiple = max(map(len, rows)), self.pad_to_multiple_of or 1
        out = torch.full((len(rows), -(-length // multiple) * multiple), value)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def _ref_logps(self, batch: dict[str, Any], labels: list[Tensor], saved: list[Any]) -> Tensor:
        """Return the saved log-probs: [S] for one number per sequence, else in the shape of token_stats(shift=True)."""
        values = [torch.as_tensor(x, dtype=torch.float32) for x in saved]
        if all(x.dim() == 0 for x in values):
            return torch.stack(values)
        for x, y in zip(values, labels, strict=True):
            wanted = int((y[1:] != self.label_pad).sum())
            if x.dim() != 1 or len(x) != wanted:
                raise ValueError(
                    f"rows: expected {wanted} saved reference log-probs, one for each predicted token, got {list(x.shape)}: "
                    "they were made with another truncation"
                )
        if self.packed:
            mask = shift_packed(batch["labels"], batch["cu_seqlens"], self.label_pad) != self.label_pad
        else:
            mask = shifted_labels(batch["labels"], True, self.label_pad)[:, :-1] != self.label_pad
        return torch.zeros_like(mask, dtype=torch.float32).masked_scatter_(mask, torch.cat(values))


@dataclass(frozen=True)
class PreferenceCollator(_Collator):
    """Make a batch from rows with prompt_ids, chosen_ids and rejected_ids.

    The B chosen sequences come first, then the B rejected ones:

        input_ids, attention_mask, labels, completion_mask    [2B, T], padded on the right

    With packed=True the sequences follow each other without padding. The losses take them with cu_seqlens=, and
    transformers takes them with input_ids and position_ids alone (flash attention's varlen: cu_seq_lens_q = cu_seq_lens_k
    = cu_seqlens, max_length_q = max_length_k = max_length; other attention finds the sequences from position_ids):

        input_ids, position_ids [1, total]    labels [total]    cu_seqlens [2B + 1] int32    max_length, an int

    labels are not shifted (the losses take shift=True), and are label_pad on prompts and padding.

    The batch also has ref_logps, float32, for fl.LogProbs, if the rows have ref_chosen_logps and ref_rejected_logps.
    These are numbers, which give [2B], or lists with one number for each predicted token, which give [2B, T - 1] or
    [total]. Either all rows of a batch have them, or none.

    Args:
        pad_token_id: The token id of the padding.
        max_length: The number of tokens of prompt and completion together that are kept; None keeps all. ValueError where
            no token of a completion is left to predict; the first token of a sequence is not predicted.
        truncation: "keep_start" keeps the first max_length tokens, "keep_end" the last.
        packed: True makes packed batches.
        pad_to_multiple_of: The length T is padded to a multiple of this number. None: no such padding. Not allowed with
            packed=True.
        label_pad: The label of tokens that are not predicted, a negative number.
    """

    columns = {"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"}
    made_by = "tokenize_preferences"


@dataclass(frozen=True)
class UnpairedCollator(_Collator):
    """Make a batch of B sequences from rows with prompt_ids, completion_ids and label.

    The batch is as that of PreferenceCollator, with desirable [B] bool, which fl.kto_loss takes. ref_logps comes from a
    column of the same name.

    Args:
        pad_token_id: As in PreferenceCollator.
        max_length: As in PreferenceCollator.
        truncation: As in PreferenceCollator.
        packed: As in PreferenceCollator.
        pad_to_multiple_of: As in PreferenceCollator.
        label_pad: As in PreferenceCollator.
        kl: True adds "kl", a batch of each prompt with the completion of the row before (the first prompt with the last
            row's completion), which fl.kto_baseline takes. It has no saved log-probs, and needs at least two rows.
    """

    columns = {"completion_ids": "ref_logps"}
    made_by = "tokenize_unpaired"

    kl: bool = field(default=False, kw_only=True)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        if wrong := [row.get("label") for row in rows if row.get("label") not in (True, False)]:
            raise ValueError(f"label: expected True or False in each row, got {wrong[0]!r}")
        batch["desirable"] = torch.tensor([bool(row["label"]) for row in rows])
        if self.kl:
            if len(rows) < 2:
                raise ValueError("kl: expected two rows or more in a batch, got 1: its completion has no other prompt")
            before = [rows[i - 1]["completion_ids"] for i in range(len(rows))]
            mixed = zip(rows, before, strict=True)
            batch["kl"] = self._batch([self._sequence(i, *pair, "completion_ids") for i, pair in enumerate(mixed)])
        return batch


def _check_truncation(max_length: int | None, truncation: str) -> None:
    """Raise ValueError for a max_length or a truncation that is not valid."""
    _check_count("max_length", max_length)
    if truncation not in CUTS:
        raise ValueError(f"truncation: expected {' or '.join(map(repr, CUTS))}, got {truncation!r}")


def _check_count(name: str, value: int | None) -> None:
    """Raise ValueError unless the value is an int >= 1 or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}: expected an int >= 1 or None, got {value!r}")
