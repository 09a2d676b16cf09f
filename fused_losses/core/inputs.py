"""The inputs from which distributions are computed, and the output of token_stats."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .names import shape_of, short_fields

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PACKAGE = __package__.rpartition(".")[0]  # the name of this copy of the package
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRAINED = ("policy", "student")  # names of the inputs that a loss trains
# Other ways to pass a DTensor that is not part of a head: the ends of error messages
INSTEAD = {"logits": ", or pass this rank's columns, .to_local(), with their process_group", "logps": "", "labels": ""}


def positive(name: str, value: float | None, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0{' or None' if optional else ''}, got {value!r}")


def _float_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        hint = f"; pass its .{name}" if isinstance(getattr(x, name, None), Tensor) else ""
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{hint}")
    _dense(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    return x


def _dense(name: str, x: Tensor) -> None:
    """Check that x is a strided tensor with all its elements on this rank: no DTensor, no sparse layout."""
    if type(x).__name__ == "DTensor":
        instead = INSTEAD.get(name, ", or call fl.FusedHead as a module, so that the sharding engine's hooks do")
        raise TypeError(f"{name}: got a DTensor; gather it first (.full_tensor()){instead}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")


def _head_options(source: Logits | Hidden, v: int, what: str) -> None:
    positive("softcap", source.softcap, optional=True)
    positive("scale", source.scale)
    if not isinstance(source.temperature, Tensor):
        positive("temperature", source.temperature)
    valid = source.valid_vocab
    if valid is not None and (type(valid) is not int or not 1 <= valid <= v):
        raise ValueError(f"valid_vocab: expected an int in [1, {v}] for {what} with V={v}, got {valid!r}")


def _whole(name: str, x: object, dim: int | None) -> None:
    """Check that x is a dense tensor with dim dimensions (None: any number) and all its elements on this rank."""
    x = _float_tensor(name, x)
    if name != "hidden" and x.numel() == 0:
        raise ValueError(
            f"{name}: has no elements, shape {list(x.shape)}: its sharding engine holds it elsewhere. Call fl.FusedHead as a "
            "module inside the engine's forward, or gather it (deepspeed.zero.GatheredParameters, FSDP.summon_full_params)"
        )
    if dim is not None and x.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got shape {list(x.shape)}")


def _own_rows(name: str, x: Tensor, group: object) -> Tensor:
    """Return the rows of a DTensor that are on this rank of the group; return other tensors unchanged.

    The gradient of a DTensor is a DTensor again.
    """
    if type(x).__name__ != "DTensor":
        return x
    if len(x.placements) != 1 or not x.placements[0].is_shard(0):  # type: ignore[attr-defined]
        placements = x.placements  # type: ignore[attr-defined]
        raise ValueError(f"{name}: beside process_group expected a DTensor sharded on dim 0 alone, got {placements}")
    ranks, mesh = torch.distributed.get_process_group_ranks(group), x.device_mesh.mesh.tolist()  # type: ignore
    if ranks != mesh:
        raise ValueError(f"{name}: expected a DTensor over the ranks of process_group, {ranks}, got one over {mesh}")
    return x.to_local()  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False)
class Logits:
    """Logits [..., V] with the options of the head.

    The distribution is the softmax of softcap tanh(z / softcap) * scale / temperature.

    Args:
        logits: The logits z [..., V].
        softcap: The softcap, as Gemma's final_logit_softcapping. None means no softcap.
        scale: The factor on the logits, as Cohere's logit_scale. Granite's logits_scaling divides: pass its inverse.
        temperature: The divisor of the logits: a number, or a tensor > 0 with one number for each row [...] of logits
            [..., V], or each sequence [S] of logits [S, T, V], without a gradient. A tensor goes with logits on both sides of a
            call, and a vocabulary that is not split.
        valid_vocab: The number of columns, counted from the first, that are tokens. The other columns are padding: they are
            not part of the softmax and get zero gradient. None means that all columns are tokens.
        process_group: The torch.distributed group over whose ranks the vocabulary is split, or None. `logits` then holds the
            columns of this rank. The slices may have any sizes and are in the order of the ranks. The labels hold ids of
            the whole vocabulary. Labels and results are the same on all ranks.
        shard: The id of the first column and the number of tokens of all ranks together. With it, the ranks need not
            exchange these numbers. None: they exchange them.
    """

    logits: Tensor
    softcap: float | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    temperature: float | Tensor = field(default=1.0, kw_only=True)
    valid_vocab: int | None = field(default=None, kw_only=True)
    process_group: ProcessGroup | None = field(default=None, kw_only=True)
    shard: tuple[int, int] | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return short_fields(self)

    def __post_init__(self) -> None:
        _check_group(self)
        if _float_tensor("logits", self.logits).dim() < 1 or self.logits.shape[-1] < 1:
            raise ValueError(f"logits: expected shape [..., V] with V >= 1, got {tuple(self.logits.shape)}")
        if isinstance(self.temperature, Tensor):
            if self.process_group is not None:
                raise ValueError(
                    "temperature: expected a number where the vocabulary is split over ranks, got a tensor"
                )
            object.__setattr__(self, "temperature", _temperatures("logits", self.logits, self.temperature))
        _head_options(self, self.logits.shape[-1], "logits")
        _check_shard(self)

    @property
    def vocab(self) -> int:
        return self.valid_vocab or self.logits.shape[-1]

    @property
    def multiplier(self) -> float:
        """Return the factor on all logits, apart from `factors`."""
        return self.scale if isinstance(self.temperature, Tensor) else self.scale / self.temperature

    @property
    def factors(self) -> Tensor | None:
        """Return 1 / temperature for each row [...]; None: it is one number."""
        return 1 / self.temperature if isinstance(self.temperature, Tensor) else None


class Lora(NamedTuple):
    """Low-rank factors on a head: the weight becomes weight + scaling * b @ a, but this sum is never computed.

    Args:
        a: The factor [r, H], peft's lora_A.weight.
        b: The factor [V, r], peft's lora_B.weight.
        scaling: The factor lora_alpha / r.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


@dataclass(frozen=True, repr=False)
class Hidden:
    """Hidden states [..., H] and the head that computes logits [..., V] from them.

    Made under torch.no_grad(), all of them are constants, also a weight that is a Parameter.

    The logits are never all in memory at once. They are

        softcap tanh(z / softcap) * scale / temperature,    z = hidden @ weight.T + scaling * (hidden @ a.T) @ b.T + bias

    Each tensor that requires grad gets its gradient, summed in float32 and rounded once to its own dtype. The matrix
    products run in the dtype of hidden (under autocast, in the dtype of autocast); the weight is cast one slice at a time.

    Args:
        hidden: The hidden states [..., H].
        weight: The weight of the head [V, H].
        bias: The bias of the head [V], or None.
        softcap: As in fl.Logits.
        scale: As in fl.Logits.
        temperature: As in fl.Logits; or a tensor > 0 with one number for each row [...] of hidden, or each sequence [S] of
            hidden [S, T, H], without a gradient. The states are then divided by it, so that the head may have neither softcap
            nor bias.
        valid_vocab: As in fl.Logits.
        lora: The low-rank factors fl.Lora(a, b, scaling), or None.
        process_group: The group over which the head is split, or None (see fl.Logits). weight, bias and lora.b are then the
            rows of this rank. hidden and lora.a are the same on all ranks, and their gradients are summed over the group.
            weight and bias may be DTensors sharded on dim 0, as tensor parallelism creates them for a column-wise head.
        shard: As in fl.Logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    temperature: float | Tensor = field(default=1.0, kw_only=True)
    valid_vocab: int | None = field(default=None, kw_only=True)
    lora: Lora | None = field(default=None, kw_only=True)
    process_group: ProcessGroup | None = field(default=None, kw_only=True)
    shard: tuple[int, int] | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return short_fields(self)

    def __post_init__(self) -> None:
        _check_group(self)
        if self.process_group is not None:
            for name, x in (("weight", self.weight), ("bias", self.bias)):
                object.__setattr__(self, name, x if x is None else _own_rows(name, x, self.process_group))
        for name, x, dim in (("hidden", self.hidden, None), ("weight", self.weight, 2), ("bias", self.bias, 1)):
            if name != "bias" or x is not None:
                _whole(name, x, dim)
        if self.lora is not None:
            object.__setattr__(self, "lora", Lora(*self.lora))
            _whole("lora a", self.lora.a, 2)
            _whole("lora b", self.lora.b, 2)
            if not isinstance(self.lora.scaling, int | float):
                raise TypeError(f"lora scaling: expected a number, got {self.lora.scaling!r}")
        if isinstance(self.temperature, Tensor):
            object.__setattr__(self, "hidden", _tempered(self.hidden, self.temperature, self.softcap, self.bias))
            object.__setattr__(self, "temperature", 1.0)
        _head_options(self, self.weight.shape[0], "a head weight")
        _check_shard(self)
        if not torch.is_grad_enabled():
            self._detach()

    def _detach(self) -> None:
        """Make the tensors constants, as what is computed from them under torch.no_grad() would be."""
        for name in ("hidden", "weight", "bias"):
            x = getattr(self, name)
            if x is not None and x.requires_grad:
                object.__setattr__(self, name, x.detach())
        if self.lora is not None and (self.lora.a.requires_grad or self.lora.b.requires_grad):
            lora = self.lora._replace(a=self.lora.a.detach(), b=self.lora.b.detach())
            object.__setattr__(self, "lora", lora)

    @property
    def vocab(self) -> int:
        return self.valid_vocab or self.weight.shape[0]

    @property
    def multiplier(self) -> float:
        return self.scale / cast(float, self.temperature)  # a tensor is part of the states


def _tempered(hidden: Tensor, temperature: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """Return hidden states divided by the temperature of each row or sequence, rounded once to their dtype."""
    if softcap is not None or bias is not None:
        raise ValueError(
            "temperature: a tensor divides the hidden states, which is the same only for a head without softcap and bias"
        )
    return (hidden / _temperatures("hidden", hidden, temperature).unsqueeze(-1)).to(hidden.dtype)


def _temperatures(name: str, x: Tensor, temperature: Tensor) -> Tensor:
    """Return the temperature of each row [...] of x [..., V] or [..., H], without a gradient."""
    rows, dtype = tuple(x.shape[:-1]), temperature.dtype
    by_sequence = x.dim() == 3 and temperature.shape == rows[:1] != rows
    if dtype not in FLOATS or not (by_sequence or tuple(temperature.shape) in ((), rows)):
        shapes = f"{list(rows)} or {list(rows[:1])}" if x.dim() == 3 else str(list(rows))
        raise ValueError(
            f"temperature: expected a number or a float tensor {shapes}, got {dtype} {list(temperature.shape)}"
        )
    if temperature.device != x.device:
        raise ValueError(f"temperature: expected {x.device} as {name}, got {temperature.device}")
    if temperature.is_cpu and not torch.compiler.is_compiling() and not (temperature > 0).all():
        raise ValueError("temperature: expected numbers > 0")
    each = temperature.detach()
    return (each.unsqueeze(-1) if by_sequence else each).expand(rows)


def _check_group(x: Logits | Hidden) -> None:
    if x.process_group is None:
        if x.shard is not None:
            raise ValueError(f"shard: is of a vocabulary split over a process_group, got {x.shard!r} without one")
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("process_group: torch.distributed is not initialised")
    if not isinstance(x.process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup, got {type(x.process_group).__name__}"
        )


def _check_shard(x: Logits | Hidden) -> None:
    if x.shard is not None:
        first, total = x.shard
        if not (isinstance(first, int) and isinstance(total, int) and 0 <= first <= total - x.vocab):
            raise ValueError(f"shard: expected (first, total) with first + {x.vocab} <= total, got {x.shard!r}")


@dataclass(frozen=True, repr=False)
class LogProbs:
    """Precomputed log-probs of the labels.

    Args:
        logps: One log-prob for each token, aligned with the outputs of token_stats. On the reference side of a preference
            loss it may also be one for each sequence [S], already summed over its tokens.
    """

    logps: Tensor

    def __repr__(self) -> str:
        return short_fields(self)

    def __post_init__(self) -> None:
        _float_tensor("logps", self.logps)


Source = Tensor | Logits | Hidden | LogProbs


@dataclass(frozen=True, repr=False)
class TokenStats:
    """The numbers that token_stats returns for each token, in nats.

    They are float32 (float64 for float64 logits), and zero where mask is False.

    Attributes:
        logps: log p(label). Differentiable with respect to the policy.
        ref_logps: log q(label), or None without ref. Differentiable with respect to the reference, if it requires grad.
        divergence: {name: D(p, q)} for the requested divergences. Differentiable with respect to both.
        entropy: H(p) if requested, else None. Differentiable with respect to the policy.
        lse: log sum_v exp z_v; None for LogProbs. Differentiable with respect to the policy.
        mask: True where label != ignore_index.
        correct: True where the label has the highest policy logit; a tie counts as correct.
        collision: log sum_v p_v^2 if requested, else None. Not differentiable.
    """

    logps: Tensor
    ref_logps: Tensor | None
    divergence: dict[str, Tensor]
    entropy: Tensor | None
    lse: Tensor | None
    mask: Tensor
    correct: Tensor | None
    collision: Tensor | None = None

    def __repr__(self) -> str:
        return short_fields(self)


def as_source(name: str, x: Source) -> Logits | Hidden | LogProbs:
    """Return x as a source; a bare tensor becomes Logits.

    Tensors made under torch.inference_mode are replaced by ordinary() ones.
    """
    x = Logits(x) if isinstance(x, Tensor) else x
    if not isinstance(x, Logits | Hidden | LogProbs):
        got = kind_of(x, Logits, Hidden, LogProbs)  # type: ignore[unreachable]
        raise TypeError(
            f"{name}: expected a tensor of logits, fl.Logits, fl.Hidden or fl.LogProbs, got {got}{_instead_of(x)}"
        )
    lora = x.lora if isinstance(x, Hidden) else None
    tensors = {
        n: getattr(x, n) for n in ("logits", "hidden", "weight", "bias", "logps") if getattr(x, n, None) is not None
    }
    factors = {} if lora is None else {"a": lora.a, "b": lora.b}
    made = {n: t for n, t in (tensors | factors).items() if ordinary(t) is not t}
    if not made:
        return x
    for n, t in made.items():
        if t.requires_grad and name in TRAINED and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {n} requires grad, but was made under torch.inference_mode and can get none; make or load it "
                "outside, or call requires_grad_(False) where it is constant"
            )
    changed: dict[str, Any] = {n: ordinary(t) for n, t in tensors.items()}
    if lora is not None:
        changed["lora"] = lora._replace(a=ordinary(lora.a), b=ordinary(lora.b))
    return replace(x, **changed)


def _instead_of(x: object) -> str:
    """Return what to pass instead of an object of another library, or an empty string."""
    if isinstance(x, torch.nn.Module):
        return "; pass fl.at_head(model, loss, **inputs), or its head.source(hidden)"
    if hasattr(x, "logits"):
        return "; pass its .logits, or call fl.at_head(model, ...), which never makes them"
    if hasattr(x, "last_hidden_state"):
        return "; pass fl.Hidden(output.last_hidden_state, lm_head.weight)"
    return ""


def ordinary(x: Tensor) -> Tensor:
    """Return x itself, or, if it was made under torch.inference_mode, a constant over the same memory.

    Autograd accepts this constant. Under torch.compile, or inside torch.inference_mode, x is returned unchanged.
    """
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    empty = torch.empty(0, dtype=x.dtype, device=x.device)
    return empty.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def kind_of(x: object, *expected: type) -> str:
    """Return the name of the class of x, for an error message that it is none of the expected classes.

    If the class is one of them from another copy of this package, the text says so.
    """

    def names(kind: type) -> tuple[str, str]:
        return kind.__module__.rpartition(".")[2], kind.__name__

    kind = type(x)
    if names(kind) not in map(names, expected):
        return kind.__name__
    return (
        f"{kind.__name__} of another copy of {PACKAGE}, which was loaded twice: pass objects of the copy that is called"
    )


def _check_compiled() -> None:
    """Check that torch.compile finds the functions of this copy of the package.

    torch.compile looks up functions by the names of their modules.
    """
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    load = getattr(dynamo, "_import_module", import_module)  # torch.compile stores the modules that it has found
    if vars(load(__name__)) is not globals():
        raise RuntimeError(
            f"{PACKAGE}: torch.compile looks functions up by the names of their modules, and finds those of another copy "
            "of the package, which was loaded under the same name: compile calls of that copy alone, or start a new process; "
            "without torch.compile all copies work"
        )


# The same as torch.compiler.assume_constant_result, which would import torch._dynamo, and so Triton, with this package.
_check_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_labels(labels: object) -> Tensor:
    if torch.compiler.is_compiling():
        _check_compiled()
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an integer tensor, got {type(labels).__name__}")
    _dense("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(
            f"labels: expected integer token ids, got {labels.dtype}; the order of the arguments is policy, labels, ref"
        )
    labels = ordinary(labels)
    return labels if labels.dtype in (torch.int64, torch.int32) else labels.long()  # ignore_index must not wrap around


def check_aligned(name: str, x: Logits | Hidden, labels: Tensor) -> None:
    tensor, what, last = (x.logits, "logits", "V") if isinstance(x, Logits) else (x.hidden, "hidden", "H")
    if isinstance(x, Hidden):
        _check_head(name, x)
    if tensor.shape[:-1] != labels.shape:
        wanted, hint = shape_of(*labels.shape, last), ""
        if labels.dim() and tensor.shape[:-1] == (*labels.shape[:-1], labels.shape[-1] + 1):
            hint = f"; labels without their first go with {what}[..., :-1, :], or pass all labels with shift=True"
        elif isinstance(x, Logits) and tensor.dim() <= labels.dim():
            hint = "; log-probs are passed as fl.LogProbs(...)"
        raise ValueError(
            f"{name}: expected {what} {wanted} for labels {list(labels.shape)}, got {list(tensor.shape)}{hint}"
        )
    if tensor.device != labels.device:
        raise ValueError(f"{name}: expected {what} on {labels.device} as the labels are, got {tensor.device}")


def _check_head(name: str, x: Hidden) -> None:
    """Check the shapes and devices of one side; the error messages name common mistakes."""
    h, (v, width) = x.hidden.shape[-1] if x.hidden.dim() else 0, x.weight.shape
    if x.hidden.dim() < 1 or h != width:
        hint = ""
        if h == v and v > width:
            hint = f"; a last dimension of V={v} looks like logits: pass them as fl.Logits(logits)"
        elif h == v:
            hint = "; the weight looks transposed: pass weight.T"
        raise ValueError(
            f"{name}: expected hidden [..., {width}] for weight [V, H] = {[v, width]}, got {list(x.hidden.shape)}{hint}"
        )
    if x.bias is not None and x.bias.shape[0] != v:
        raise ValueError(f"{name}: expected bias [{v}] for weight [V, H] = {[v, width]}, got {list(x.bias.shape)}")
    if x.lora is not None and (x.lora.a.shape[1] != width or x.lora.b.shape != (v, x.lora.a.shape[0])):
        raise ValueError(
            f"{name}: expected lora a [r, {width}] and b [{v}, r], got {list(x.lora.a.shape)} and {list(x.lora.b.shape)}"
        )
    a, b, _ = x.lora or (None, None, 1.0)
    for part, tensor in (("weight", x.weight), ("bias", x.bias), ("lora a", a), ("lora b", b)):
        if tensor is not None and tensor.device != x.hidden.device:
            raise ValueError(f"{name}: expected {part} on {x.hidden.device} as hidden is, got {tensor.device}")


def check_pair(policy: Logits | Hidden, ref: Logits | Hidden) -> None:
    """Check that both sources can be read in one pass, which a divergence needs; raise an error otherwise."""
    if (error := unlike(policy, ref)) is not None:
        raise error


def unlike(policy: Logits | Hidden, ref: Logits | Hidden) -> Exception | None:
    """Return an error that says why the two sources cannot be read in one pass, or None if they can."""
    if isinstance(policy, Logits) and isinstance(ref, Logits) and policy.logits.dtype != ref.logits.dtype:
        return TypeError(f"ref: expected {policy.logits.dtype} as the policy has, got {ref.logits.dtype}")
    if policy.process_group is not ref.process_group or policy.shard != ref.shard:
        return ValueError("ref: expected the policy's process_group and shard: both heads are split alike, or neither")
    if policy.vocab != ref.vocab:
        return ValueError(
            f"ref: expected the policy's vocabulary of {policy.vocab}, got {ref.vocab}; if one side is padded, give "
            f"fl.{type(ref).__name__}(..., valid_vocab=the number of real tokens) on that side"
        )
    return None
