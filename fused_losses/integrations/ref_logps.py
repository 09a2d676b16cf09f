"""Compute the log-probs of a fixed reference once, save them, and refuse to load them where they do not match.

    saved = ref_logps.precompute(reference, rows, collator, "ref", batch_size=16, tokenizer=tokenizer)
    saved = ref_logps.load("ref", model=reference, collator=collator, tokenizer=tokenizer)   # in another process
    loader = DataLoader(saved.attach(rows), batch_size=8, shuffle=True, collate_fn=collator)
    for batch in loader:
        fl.dpo_loss(policy, batch["labels"], fl.LogProbs(batch["ref_logps"]), shift=True)

The folder contains manifest.json (fingerprints, versions, counts) and files part-*.npz, each with the log-probs of some
rows. Every file is written under a temporary name and then renamed, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.layout import shift_packed
from ..engine.token_stats import token_stats
from ..nn.fused_head import FusedHead, backbone, find_head, unwrapped
from ..nn.trust_region import WRAPPERS
from .adapters import adapter_owner, adapter_tensors, as_adapter, check_adapter

__all__ = ["RefLogps", "load", "precompute"]

MANIFEST, FORMAT = "manifest.json", 1
CHUNK = 16 << 20  # the number of bytes of a weight that are hashed at a time
ADAPTED = ("base_layer", "original_module")  # names under which peft's layers store the base model's module
# Entries of a config about tokens, outputs and versions, none of which changes a log-prob.
IRRELEVANT = ("architectures", "dtype", "return_dict", "torch_dtype", "transformers_version", "use_cache")
PREFIXES, SUFFIXES = ("_", "output_"), ("_token_id",)
OF_FILES = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
)  # entries of an adapter's config that are not compared


@dataclass(frozen=True)
class RefLogps:
    """Store saved log-probs.

    values[column] has one entry per row: a number, or an array of one number per predicted token.
    """

    path: Path
    manifest: dict[str, Any]
    values: dict[str, Any]

    def __len__(self) -> int:
        return self.manifest["fingerprint"]["data"]["rows"]

    def attach(self, dataset: Any) -> Any:
        """Return the dataset with the columns from which the collator makes ref_logps.

        Existing columns of those names are replaced. Raises RuntimeError where the rows, or their order, are not those
        for which the log-probs were computed. Attach first, then shuffle, filter or concatenate.

        Args:
            dataset: A datasets.Dataset, or a list of dicts.
        """
        _check(self.path, self.manifest, data=_data(dataset, self.manifest["fingerprint"]["collator"]["columns"]))
        if hasattr(dataset, "add_column"):
            for name, values in self.values.items():
                dataset = dataset.remove_columns(name) if name in dataset.column_names else dataset
                dataset = dataset.add_column(name, values)
            return dataset
        return [{**dataset[i], **{name: x[i] for name, x in self.values.items()}} for i in range(len(dataset))]


def precompute(
    reference_model: nn.Module,
    dataset: Any,
    collator: Any,
    path: str | os.PathLike[str],
    *,
    batch_size: int,
    per_token: bool = False,
    tokenizer: Any = None,
    progress: bool = True,
    part_rows: int = 4096,
    adapter: str | None = None,
) -> RefLogps:
    """Compute the log-probs of all completions under a transformers model and write them to the folder `path`.

        sum_t log q(y_t)  per sequence,  or  log q(y_t)  per predicted token with per_token=True; float32, nats

    They are computed from hidden states. The model runs in eval mode and without gradients, and is restored afterwards.
    For a PEFT model the reference is the base with the adapter off (the implicit reference), while the adapter itself may
    be trained; or, with adapter=, the model under the adapter of this name, whichever adapter is active.

    If the folder already exists for the same model, data and settings, its rows are not computed again. Raises
    RuntimeError if it was made from anything else. Call this in one process: with several ranks, each would do all of the
    work.

    Args:
        reference_model: The transformers model.
        dataset: Rows of token ids (from data.tokenize_preferences or tokenize_unpaired). It must have a length, and it is
            read twice.
        collator: A PreferenceCollator or UnpairedCollator of integrations.data. Its truncation matters; whether it packs
            or pads does not.
        path: The folder.
        batch_size: The number of rows in a batch.
        per_token: True saves one number per predicted token, False one per sequence.
        tokenizer: If given, its fingerprint is saved too.
        progress: Whether to show a progress bar.
        part_rows: The number of rows in a file, which is the most that an interruption loses.
        adapter: The name of an adapter, or None for the base model.
    """
    for name, value in (("batch_size", batch_size), ("part_rows", part_rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    folder, settings = Path(path), _settings(collator)
    now: dict[str, Any] = {
        "model": _weights(reference_model, adapter),
        "config": _config(reference_model, adapter),
        "data": _data(dataset, settings["columns"]),
        "collator": settings,
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
    }
    if now["data"]["rows"] == 0:
        raise ValueError("dataset: expected at least one row, got none")
    if (folder / MANIFEST).exists():
        manifest = _manifest(folder)
        _check(folder, manifest, **now)
        if manifest["per_token"] != per_token:
            raise RuntimeError(f"{folder}: was made with per_token={manifest['per_token']}, asked for {per_token}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {"format": FORMAT, "per_token": per_token, "part_rows": part_rows, "versions": _versions()}
        manifest |= {"names": list(collator.columns.values()), "adapter": adapter, "fingerprint": now}
        _write(folder / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    missing = [(first, last) for first, last in _parts(manifest) if not _part(folder, first).exists()]
    if missing:
        with _as_reference(reference_model, adapter):
            head = find_head(reference_model, adapter=adapter is not None)
            _fill(head, backbone(reference_model), dataset, collator, folder, manifest, missing, batch_size, progress)
    return load(folder)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    dataset: Any = None,
    tokenizer: Any = None,
    collator: Any = None,
    adapter: str | None = None,
) -> RefLogps:
    """Load what precompute has written, and compare it with all arguments that are given.

    attach(dataset) compares the dataset in any case. Raises RuntimeError that names all differences, or where rows are
    missing.

    Args:
        path: The folder.
        model: Its weights and config are compared; for a PEFT model those of the base, and of the adapter that precompute
            was given.
        dataset: Its rows and their order are compared.
        tokenizer: Its vocabulary, special tokens and chat template are compared.
        collator: Its truncation is compared.
        adapter: The name of the reference's adapter in this model, if it differs from the name that precompute was given.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    now: dict[str, Any] = {}
    if model is not None:
        adapter = manifest.get("adapter") if adapter is None else adapter
        now |= {"model": _weights(model, adapter), "config": _config(model, adapter)}
    if tokenizer is not None:
        now["tokenizer"] = _tokenizer(tokenizer)
    if collator is not None:
        now["collator"] = _settings(collator)
    if dataset is not None:
        now["data"] = _data(dataset, manifest["fingerprint"]["collator"]["columns"])
    _check(folder, manifest, **now)
    parts, rows = _parts(manifest), manifest["fingerprint"]["data"]["rows"]
    there = [(first, last) for first, last in parts if _part(folder, first).exists()]
    if len(there) < len(parts):
        done = sum(last - first for first, last in there)
        raise RuntimeError(
            f"{folder}: has {done} of {rows} rows, it was interrupted; call precompute with the same arguments to go on"
        )
    read = [_read(_part(folder, first), manifest["names"], last - first) for first, last in parts]
    values: dict[str, Any] = {}
    for name in manifest["names"]:
        flat, lengths = (np.concatenate([part[key] for part in read]) for key in (name, f"{name}.lengths"))
        values[name] = np.split(flat, np.cumsum(lengths)[:-1]) if manifest["per_token"] else flat
    return RefLogps(folder, manifest, values)


# ---- computing -----------------------------------------------------------------------------------------------------------


def _fill(
    head: FusedHead,
    body: nn.Module,
    dataset: Any,
    collator: Any,
    folder: Path,
    manifest: dict[str, Any],
    missing: list[tuple[int, int]],
    batch_size: int,
    progress: bool,
) -> None:
    """Compute the log-probs of the missing parts and write each part."""
    from tqdm.auto import tqdm

    total = sum(last - first for first, last in missing)
    names, each = manifest["names"], manifest["per_token"]
    with tqdm(total=total, disable=not progress, desc="Reference", unit="rows") as bar:
        for first, last in missing:
            by_name: dict[str, list[Tensor]] = {name: [] for name in names}
            for start in range(first, last, batch_size):
                rows = [dataset[i] for i in range(start, min(start + batch_size, last))]
                logps = _logps(head, body, collator.inputs(rows), collator.label_pad)
                for i, name in enumerate(names):
                    by_name[name] += logps[i * len(rows) : (i + 1) * len(rows)]
                bar.update(len(rows))
            arrays: dict[str, Tensor] = {}
            for name, x in by_name.items():
                sums = torch.cat(x) if each else torch.stack([row.sum() for row in x])
                arrays |= {name: sums.float(), f"{name}.lengths": torch.tensor([len(row) for row in x])}
            _write(_part(folder, first), partial(_save, arrays))


def _save(arrays: dict[str, Tensor], file: Any) -> None:
    """Write the arrays to an open npz file."""
    numbers: dict[str, Any] = {name: x.numpy() for name, x in arrays.items()}
    np.savez(file, **numbers)


def _logps(head: Any, body: nn.Module, batch: dict[str, Any], ignore: int) -> list[Tensor]:
    """Return one tensor per sequence, with one float64 number per predicted token."""
    device, packed = next(body.parameters()).device, "cu_seqlens" in batch
    tensors = {name: x.to(device) for name, x in batch.items() if isinstance(x, Tensor)}
    optional_inputs = {name: tensors[name] for name in ("attention_mask", "position_ids") if name in tensors}
    hidden, labels = body(tensors["input_ids"], use_cache=False, **optional_inputs).last_hidden_state, tensors["labels"]
    if packed:
        hidden, labels = hidden[0], shift_packed(labels, tensors["cu_seqlens"], ignore)
    stats = token_stats(head.source(hidden), labels, shift=not packed, ignore_index=ignore)
    logps, mask = stats.logps.double().cpu(), stats.mask.cpu()
    lengths = batch["cu_seqlens"].diff().tolist() if packed else None
    rows = zip(*((x.split(lengths) if packed else x.unbind()) for x in (logps, mask)), strict=True)
    return [x[m] for x, m in rows]


@contextmanager
def _as_reference(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Set the model to eval mode without gradients, on this adapter or on none, inside the context.

    Afterwards the model is restored.
    """
    training = [m for m in model.modules() if m.training]
    adapters = any(name in m._modules for m in model.modules() for name in ADAPTED)
    owner = adapter_owner(model)
    if adapters and owner is None:
        raise TypeError(
            f"reference_model: {type(model).__name__} has adapters, but no disable_adapter(), as a peft.PeftModel has"
        )
    model.eval()
    try:
        with torch.no_grad(), as_adapter(owner if adapters else None, adapter):
            yield
    finally:
        for m in training:
            m.training = True


# ---- files ---------------------------------------------------------------------------------------------------------------


def _parts(manifest: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the first row of each part, and the first row of the next part."""
    rows, each = manifest["fingerprint"]["data"]["rows"], manifest["part_rows"]
    return [(first, min(first + each, rows)) for first in range(0, rows, each)]


def _part(folder: Path, first: int) -> Path:
    return folder / f"part-{first:09d}.npz"


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file completely or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _read(path: Path, names: list[str], rows: int) -> dict[str, Any]:
    """Return the arrays of a part, or raise RuntimeError where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            part = {key: file[key] for name in names for key in (name, f"{name}.lengths")}
        if any(len(part[f"{name}.lengths"]) != rows for name in names):
            raise ValueError(f"expected {rows} rows")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise RuntimeError(
            f"{path}: cannot be read ({e}); delete it and call precompute with the same arguments"
        ) from e
    return part


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, or raise an error where there is none of the current format."""
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"path: expected a folder that precompute has made, got {folder}, without {MANIFEST}")
    manifest = json.loads(path.read_text("utf-8"))
    if manifest.get("format") != FORMAT:
        raise RuntimeError(
            f"{path}: expected format {FORMAT}, got {manifest.get('format')}: another version has made it"
        )
    return manifest


def _versions() -> dict[str, str]:
    """Return the versions of torch, fused_losses and transformers."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"torch": str(torch.__version__)}
    for name in ("fused_losses", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            versions[name] = "not installed"
    return versions


# ---- fingerprints --------------------------------------------------------------------------------------------------------


def _check(folder: Path, manifest: dict[str, Any], **now: Any) -> None:
    """Raise RuntimeError with all differences between the saved fingerprint and the parts of one in `now`."""
    saved, words = manifest["fingerprint"], []
    for part, value in now.items():
        if value is None or value == saved[part]:
            continue
        if saved[part] is None:
            words.append(f"{part}: no fingerprint was saved, for precompute was not given one")
        elif part == "model":
            names = sorted(k for k in saved[part].keys() | value.keys() if saved[part].get(k) != value.get(k))
            words.append(f"model: {len(names)} weights are others, such as {', '.join(names[:3])}")
        elif part == "data":
            words.append(_other_rows(saved[part], value))
        elif part == "tokenizer":
            words.append(f"tokenizer: another {' and '.join(k for k in value if value[k] != saved[part][k])}")
        else:  # config, collator: names that only one version of transformers has are not compared
            names = [k for k in value if k in saved[part] and value[k] != saved[part][k]]
            words += [f"{part}: {k} was {saved[part][k]!r}, is {value[k]!r}" for k in names]
    if words:
        raise RuntimeError(f"{folder}: the log-probs are stale; delete the folder, or give another. {'; '.join(words)}")


def _other_rows(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """Return how the rows of two fingerprints differ."""
    if saved["rows"] != now["rows"]:
        return f"data: had {saved['rows']} rows, has {now['rows']}"
    if saved["any order"] == now["any order"]:
        return "data: the same rows in another order"
    return "data: token ids of some rows are others"


def _settings(collator: Any) -> dict[str, Any]:
    """Return the settings of a collator, or raise TypeError where it is none of integrations.data."""
    if not callable(getattr(collator, "settings", None)) or not hasattr(collator, "columns"):
        kind = type(collator).__name__
        raise TypeError(f"collator: expected a PreferenceCollator or UnpairedCollator of integrations.data, got {kind}")
    return collator.settings()


def _data(dataset: Any, columns: list[str]) -> dict[str, Any]:
    """Return the number of rows and two hashes of their token ids, one of which does not depend on their order."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            "dataset: expected rows that can be counted and read again (a datasets.Dataset or a list), got "
            f"{type(dataset).__name__}; a stream has no fingerprint"
        )
    names = ["prompt_ids", *columns]
    rows = dataset.select_columns(names) if hasattr(dataset, "select_columns") else dataset
    ordered, total = hashlib.sha256(), 0
    for i in range(len(rows)):
        row, one = rows[i], hashlib.sha256()
        for name in names:
            ids = np.asarray(row[name], dtype=np.int64)
            one.update(len(ids).to_bytes(8, "little"))
            one.update(ids.tobytes())
        ordered.update(one.digest())
        total += int.from_bytes(one.digest(), "little")
    return {"rows": len(rows), "in order": ordered.hexdigest(), "any order": f"{total % 2**256:064x}"}


def _tokenizer(tokenizer: Any) -> dict[str, str]:
    """Return hashes of the vocabulary, the special tokens and the chat template."""

    def digest(x: Any) -> str:
        return hashlib.sha256(json.dumps(x, sort_keys=True, default=str).encode()).hexdigest()

    special = [tokenizer.special_tokens_map, sorted(tokenizer.all_special_ids)]
    parts = {"vocabulary": tokenizer.get_vocab(), "special tokens": special}
    return {name: digest(x) for name, x in (parts | {"chat template": tokenizer.chat_template}).items()}


def _config(model: nn.Module, adapter: str | None) -> dict[str, Any]:
    """Return settings that weights do not contain.

    Examples are rope, softcap, window, experts per token, and alpha and type of an adapter.
    """

    def relevant(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        skip = lambda k: k in IRRELEVANT or k.startswith(PREFIXES) or k.endswith(SUFFIXES)  # noqa: E731
        return {k: relevant(v) for k, v in x.items() if not skip(k)}

    config: Any = getattr(unwrapped(model), "config", None)
    settings = relevant(json.loads(config.to_json_string(use_diff=False))) if hasattr(config, "to_json_string") else {}
    if adapter is not None:
        adapter_config = check_adapter("adapter", model, adapter).peft_config[adapter]
        plain = {
            k: sorted(x) if isinstance(x, set) else x for k, x in adapter_config.to_dict().items() if k not in OF_FILES
        }
        settings |= {f"adapter's {k}": x for k, x in json.loads(json.dumps(plain, default=str)).items()}
    return settings


def _weights(model: nn.Module, adapter: str | None) -> dict[str, str]:
    """Return a hash of dtype, shape and content of each parameter and persistent buffer, by name.

    Tied tensors are read once.
    """
    read: dict[int, str] = {}
    hashes = {}
    tensors = list(_base(unwrapped(model), ""))
    if adapter is not None:
        tensors += adapter_tensors(check_adapter("adapter", model, adapter), adapter)
    for name, x in tensors:
        if id(x) not in read:
            _refuse(name, x)
            read[id(x)] = _content(x.detach())
        hashes[name] = read[id(x)]
    return hashes


def _base(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the base model.

    In place of a layer with an adapter, the original layer is read, under the same name.
    """
    for name in ADAPTED:
        if (inner := module._modules.get(name)) is not None:
            if getattr(module, "merged", False):
                raise RuntimeError(
                    f"model: an adapter is merged into {prefix[:-1]}; unmerge it, its base is the reference"
                )
            yield from _base(inner, prefix)
            return
    for name, x in (*module._parameters.items(), *module._buffers.items()):
        if x is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, x
    for name, child in module._modules.items():
        if child is not None:
            yield from _base(child, prefix if name in WRAPPERS else f"{prefix}{name}.")


def _refuse(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor that is not complete on this rank."""
    why = None
    if type(x).__name__ == "DTensor":
        why = "is a DTensor, of which this rank has a part"
    elif x.is_meta:
        why = "is on the meta device, without content"
    elif hasattr(x, "ds_id") or (isinstance(x, nn.Parameter) and x.numel() == 0):
        why = f"has the shape {list(x.shape)} here, ZeRO-3 or FSDP holds it elsewhere"
    elif hasattr(x, "__tensor_flatten__"):
        why = f"is a {type(x).__name__}, whose bytes are elsewhere"
    if why:
        raise ValueError(f"model: {name} {why}: take the fingerprint of a model that is whole, before it is sharded")


def _content(x: Tensor) -> str:
    """Return a hash of dtype, shape and content of a tensor."""
    digest = hashlib.sha256(f"{x.dtype} {list(x.shape)}".encode())
    if x.numel():
        x = x.reshape(1) if x.dim() == 0 else x
        for piece in x.split(max(1, CHUNK * len(x) // x.nbytes)):
            digest.update(piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
