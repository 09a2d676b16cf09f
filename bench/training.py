"""python -m bench training: one training step of a whole model, by the trainers that people use and by ours.

A step is Trainer.training_step, forward and backward of a Llama of random weights on a batch of random tokens: what is around
the loss counts too. Who takes part has first to give the loss and the gradients of the step in float64, written out from
logits. MiB: the peak beyond the parameters and their gradients.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_losses as fl
from bench import clock, results, tables
from bench.measure import TOLERANCE, errors, process_peak, progress, quiet_collector, reason, spread
from bench.run import add_outputs, folder_of, header, written
from bench.workloads import Shape
from fused_losses.cli import demo
from fused_losses.cli.memory_probe import peak_bytes

Batch = dict[str, Tensor]
SHAPES = (Shape(1024, 128, 256, 16384, prompt=0.25), Shape(1024, 128, 256, 50304, prompt=0.25))
LAYERS = 4
TEXTS = Path(fl.__file__).parent / "cli/data/preferences.jsonl"  # what the trainers are made with; the batch is random


class Setting(NamedTuple):
    shape: Shape
    device: torch.device

    def model(self, seed: int, hidden: int | None = None) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        width = hidden or self.shape.hidden
        config = LlamaConfig(
            vocab_size=self.shape.vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        return LlamaForCausalLM(config).to(self.device)

    def reference(self) -> Any:
        made = self.model(1)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * p.std() * torch.randn_like(p))
        return made.requires_grad_(False)

    def batch(self) -> Batch:
        """Sequences of equal length; the first part of each is its prompt."""
        shape = self.shape
        torch.manual_seed(0)
        ids = torch.randint(1, shape.vocab, (shape.rows // shape.length, shape.length), device=self.device)
        counts = torch.ones_like(ids)
        counts[:, : int(shape.prompt * shape.length)] = 0
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": counts,
            "labels": ids.masked_fill(counts == 0, -100),
            "label": torch.arange(len(ids), device=self.device) % 2 > 0,
        }


class Step(NamedTuple):
    """A trainer at a workload. make: the trainer of a setting, in a folder."""

    workload: str
    provider: str
    ours: bool
    make: Callable[[Setting, str], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    takes: tuple[str, ...] = ("input_ids", "attention_mask", "labels", "label")  # of the batch


def arguments(setting: Setting, folder: str) -> dict[str, Any]:
    return dict(
        output_dir=folder,
        report_to=[],
        use_cpu=setting.device.type == "cpu",
        save_strategy="no",
        disable_tqdm=True,
        bf16=setting.shape.dtype == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
    )


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=demo.train_tokenizer(demo.load_pairs(str(TEXTS), 16), 300))
    made.eos_token = made.pad_token = made.convert_ids_to_tokens(0)
    made.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    return made


def texts(kind: str) -> Any:
    from datasets import Dataset

    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in demo.load_pairs(str(TEXTS), 4)]
    if kind == "chats":
        said = [(("user", r["prompt"]), ("assistant", r["chosen"])) for r in rows]
        return Dataset.from_list([{"messages": [{"role": a, "content": b} for a, b in one]} for one in said])
    if kind == "unpaired":
        one = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 > 0} for i, r in enumerate(rows)]
        return Dataset.from_list(one)
    return Dataset.from_list(rows)


def trl_trainer(name: str, where: str, kind: str, setting: Setting, folder: str, **options: Any) -> Any:
    """A trainer of `where`, TRL's or ours, with a reference or a teacher."""
    import trl
    from trl.experimental.gkd import GKDConfig

    config = GKDConfig if name == "GKD" else getattr(trl, name + "Config")
    cls = getattr(importlib.import_module(where), name + "Trainer")
    args = config(**arguments(setting, folder) | options)
    if name == "GKD":
        models: dict[str, Any] = {"teacher_model": teacher(setting)}
    else:
        models = {} if name == "SFT" else {"ref_model": setting.reference()}
    return cls(setting.model(1), args=args, train_dataset=texts(kind), processing_class=tokenizer(), **models)


def teacher(setting: Setting) -> Any:
    return setting.model(2, 2 * setting.shape.hidden).requires_grad_(False)


def plain_trainer(
    loss: Callable[..., Tensor], make_reference: Callable[[Setting], Any] | None, setting: Setting, folder: str
) -> Any:
    """transformers' Trainer with the loss written out, from the logits of both models."""
    from transformers import Trainer, TrainingArguments

    reference = None if make_reference is None else make_reference(setting)

    class Plain(Trainer):
        def compute_loss(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> Tensor:
            model_inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            with torch.no_grad():
                ref = None if reference is None else reference(**model_inputs).logits
            return loss(model(**model_inputs).logits, inputs, ref)

    return Plain(setting.model(1), TrainingArguments(**arguments(setting, folder)))


def fused_trainer(setting: Setting, folder: str, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from fused_losses.integrations.trainer import FusedLossMixin

    class Fused(FusedLossMixin, Trainer):  # type: ignore[misc]
        pass

    return Fused(setting.model(1), TrainingArguments(**arguments(setting, folder)), **options)


def own_trainer(setting: Setting, folder: str) -> Any:
    from transformers import Trainer, TrainingArguments

    return Trainer(setting.model(1), TrainingArguments(**arguments(setting, folder)))


def patched() -> AbstractContextManager[None]:
    from fused_losses.integrations import trl_kernels

    return trl_kernels.patched()


# ---- the losses, written out -----------------------------------------------------------------------------------------------


def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
    """[S], sums over the tokens that count."""
    logps = logits[:, :-1].float().log_softmax(-1) if logits.dtype != torch.float64 else logits[:, :-1].log_softmax(-1)
    y = labels[:, 1:]
    return (logps.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) * (y != -100)).sum(-1)


def sft(logits: Tensor, batch: Batch, ref: Tensor | None) -> Tensor:
    return -logps_of(logits, batch["labels"]).sum() / (batch["labels"][:, 1:] != -100).sum()


def dpo(logits: Tensor, batch: Batch, ref: Tensor) -> Tensor:
    chosen, rejected = (logps_of(logits, batch["labels"]) - logps_of(ref, batch["labels"])).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def kto(logits: Tensor, batch: Batch, ref: Tensor) -> Tensor:
    """Without a baseline (apo_zero_unpaired): one forward each."""
    h = 0.1 * (logps_of(logits, batch["labels"]) - logps_of(ref, batch["labels"]))
    return torch.where(batch["label"], -h, h).sigmoid().mean()


def gkd(logits: Tensor, batch: Batch, ref: Tensor) -> Tensor:
    """beta 0.5."""
    mask = batch["labels"][:, 1:] != -100
    p, q = (z[:, :-1].log_softmax(-1)[mask] for z in (logits, ref))
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return 0.5 * sum((x.exp() * (x - m)).sum() for x in (p, q)) / mask.sum()  # type: ignore[return-value]


TEXT = ("input_ids", "attention_mask", "labels")
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Setting], Any] | None]] = {
    "step: sft": (sft, None), "step: dpo": (dpo, Setting.reference), "step: kto": (kto, Setting.reference),
    "step: gkd": (gkd, teacher),
}  # fmt: skip


def _both(workload: str, name: str, kind: str, takes: tuple[str, ...], **options: Any) -> list[Step]:
    theirs = partial(trl_trainer, name, "trl.experimental.gkd" if name == "GKD" else "trl", kind, **options)
    mine = partial(trl_trainer, name, "fused_losses.integrations.trl_trainers", kind, **options)
    return [
        Step(workload, f"TRL {name}Trainer", False, theirs, takes=takes),
        Step(workload, f"TRL {name}Trainer in trl_kernels.patched()", True, theirs, patched, takes),
        Step(workload, f"fused_losses {name}Trainer", True, mine, takes=takes),
    ]


STEPS = [
    *(Step(name, "eager", False, partial(plain_trainer, *loss)) for name, loss in LOSSES.items()),
    Step("step: sft", "transformers Trainer", False, own_trainer, takes=TEXT),
    *_both("step: sft", "SFT", "chats", TEXT)[:2],
    Step("step: sft", "fused_losses FusedLossMixin", True, fused_trainer, takes=TEXT),
    *_both("step: dpo", "DPO", "pairs", (*TEXT[:2], "completion_mask")),
    *_both("step: kto", "KTO", "unpaired", (*TEXT[:2], "completion_mask", "label"), loss_type="apo_zero_unpaired"),
    *(
        s for s in _both("step: gkd", "GKD", "chats", TEXT, lmbda=0.0, beta=0.5) if s.around is nullcontext
    ),  # no kernels
]


# ---- measuring -------------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, step: Step, setting: Setting, batch: Batch, folder: str):
        self.step, self.times = step, []  # type: ignore[var-annotated]
        self.batch = {k: x for k, x in batch.items() if k in step.takes}
        self.trainer = step.make(setting, f"{folder}/{len(step.provider)}")
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        return self.trainer.training_step(self.model, dict(self.batch), None)

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters()]


def truth_of(workload: str, setting: Setting, batch: Batch) -> list[Tensor]:
    loss, make_reference = LOSSES[workload]
    model = setting.model(1).double()
    ref = None
    model_inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    if make_reference is not None:
        with torch.no_grad():
            ref = make_reference(setting).double()(**model_inputs).logits
    value = loss(model(**model_inputs).logits, batch, ref)
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]


def measure(
    workload: str, setting: Setting, chosen: list[Step], *, seconds: float, rounds: int, say: Callable[[str], None]
) -> Iterator[tuple[Step, dict[str, Any] | str]]:
    batch = setting.batch()
    say("float64")
    truth = truth_of(workload, setting, batch)
    runs: dict[Step, Run] = {}
    outcomes: dict[Step, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in chosen:
            say(f"checks {step.provider}")
            try:
                run = Run(step, setting, batch, folder)
                start = time.perf_counter()
                with step.around():
                    error = errors([run().detach(), *run.gradients], truth)
                clock.synchronize(setting.device)
                if any(not e <= TOLERANCE[setting.shape.dtype] for e in error.values()):
                    raise ValueError(
                        "WRONG: relative error " + ", ".join(f"{e:.1e} of the {n}" for n, e in error.items())
                    )
                outcomes[step] = {"error": error, "first_call_s": time.perf_counter() - start}
                runs[step] = run
            except Exception as e:  # whatever a peer may raise belongs in the table
                outcomes[step] = reason(e)
        del truth
        start, done = time.perf_counter(), 0
        with quiet_collector():
            while runs and (done < rounds or time.perf_counter() - start < seconds):
                for run in runs.values():
                    say(f"round {done + 1}, {run.step.provider}")
                    with run.step.around():
                        begun = time.perf_counter()
                        run()
                        clock.synchronize(setting.device)
                        run.times.append(time.perf_counter() - begun)
                done += 1
        for step, run in runs.items():
            say(f"memory of {step.provider}")
            run.model.zero_grad(set_to_none=True)
            with step.around():
                peak = peak_bytes(run)
                process = process_peak(run) if setting.device.type == "cpu" else None
            gradients = sum(g.nbytes for g in run.gradients)
            models = sum(p.nbytes for p in run.model.parameters())
            both = spread(run.times)
            outcomes[step] |= {
                "seconds": run.times,
                "p20": both["p20"],
                "p80": both["p80"],
                "peak_bytes": peak - gradients,
                "peak_total": peak + models,
                "process_peak": process,
            }
    for step in chosen:
        yield step, outcomes[step]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench training", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=[name[6:] for name in LOSSES], help="only these")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=5, help="the fewest of each measurement (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="more rounds for so long (%(default)s)")
    add_outputs(parser)
    args = parser.parse_args(argv)
    args.grid = "training"
    warnings.filterwarnings("ignore")
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    shapes = (Shape(64, 16, 32, 512, prompt=0.25),) if args.tiny else SHAPES
    if device.type != "cpu" and not args.tiny:
        shapes = (Shape(8192, 512, 1024, 151936, "bfloat16", prompt=0.25),)
    report, _ = header(device, {s.dtype for s in shapes}, ["training", *argv])
    folder, stem = folder_of(args, report["machine_info"]["device"])
    wrong = 0
    names = [name for name in LOSSES if not args.workloads or name[6:] in args.workloads]
    todo = [(name, shape) for shape in shapes for name in names]
    for i, (name, shape) in enumerate(todo, 1):
        chosen = [step for step in STEPS if step.workload == name]
        params = shape._asdict() | {"logits": f"random, {shape.prompt:.0%} prompt"}
        say = lambda text, i=i, name=name, shape=shape: progress(f"{i}/{len(todo)} {name} {shape}: {text}")  # noqa: E731
        for step, outcome in measure(
            name, Setting(shape, device), chosen, seconds=args.seconds, rounds=args.rounds, say=say
        ):
            if isinstance(outcome, str):
                place = {"group": name, "provider": step.provider, "shape": str(shape), "dtype": shape.dtype}
                report["left_out"].append(place | {"logits": params["logits"], "reason": outcome})
                wrong += step.ours
            else:
                about = {"ours": step.ours, "exact": True, "source": "model"}
                times = outcome.pop("seconds")
                report["benchmarks"].append(
                    results.benchmark(name, step.provider, copy.copy(params), times, **about, **outcome)
                )
        results.save(folder / f"{stem}.json", report)
    progress("")
    tables.print_tables(report)
    for path in written(report, args, folder, stem):
        print(os.path.relpath(path))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
