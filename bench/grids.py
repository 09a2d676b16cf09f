"""What python -m bench can measure: workloads on shapes by providers, in grids, and the part of a grid that is asked for."""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.providers import Provider, providers
from bench.workloads import WORKLOADS, Shape, Workload


class Job(NamedTuple):
    """Workloads by name (with * for any letters) on shapes."""

    workloads: str
    shapes: tuple[Shape, ...]
    providers: str = "*"


def _pairs(*grid: tuple[int, int], hidden: int, vocab: int, dtype: str) -> tuple[Shape, ...]:
    """(T, B): B pairs of T tokens, half of them prompt."""
    return tuple(Shape(2 * b * t, t, hidden, vocab, dtype, prompt=0.5) for t, b in grid)


BF16 = "bfloat16"
COMMON = ((4096, 4096, 128256), (8192, 4096, 128256), (8192, 4096, 151936), (8192, 2304, 256000), (16384, 2048, 131072))
SMALL_H = ((8192, 896, 151936), (8192, 1024, 151936), (8192, 2048, 248320))
# Who compiles nothing that takes half a minute.
PLAIN = "eager*,torch linear*,Liger chunked,Liger T*,TRL*,cut-cross-entropy,*filtered,QuACK*,fused*"
SMALL = Shape(512, 128, 256, 16384)
SWEEP = "eager,Liger chunked,TRL*,fused_losses"
# One variant of each peer: python -m bench --grid wide has the others, on the same shapes.
QUICK = "eager,*linear_cross_entropy,Liger chunked,Liger Triton,TRL*,cut-cross-entropy,*filtered,QuACK*,fused_losses,*16 MiB"
FULL = Shape(4096, 512, 512, 50304)
GRIDS: dict[str, list[Job]] = {
    "tiny": [Job("ce,dpo,logits: dpo", (Shape(64, 16, 32, 512),)), Job("logits: forward_kl", (Shape(64, 16, 0, 512),))],
    "quick": [
        Job("ce,dpo", (SMALL,), f"{QUICK},torch.compile,cut*compile,*slices"),
        Job("tdpo,sft + kl,token_stats", (SMALL,), f"{QUICK},torch.compile,*slices"),
        Job("jsd", (SMALL,), f"{QUICK},Liger*compiled"),
        Job("dpo saved,dpo frozen,kto,grpo*", (SMALL,), QUICK),
        Job("support*,topk,ce weights,logp temperatures,dft,lk_hybrid", (SMALL,), "eager,torch.compile,fused_losses"),
        Job("logits: token_stats,logits: logp,logits: logp + entropy,logits: forward_kl,logits: js",
            (SMALL._replace(hidden=0),), f"{QUICK},torch.compile"),
        Job("logits: *", (SMALL._replace(hidden=0),), "eager,fused*"),
        Job("dpo", (SMALL._replace(prompt=0.5), SMALL._replace(logits="peaked")), SWEEP),
        Job("dpo", (SMALL._replace(rows=256), SMALL._replace(rows=1024)), SWEEP),
        Job("dpo", (SMALL._replace(vocab=8192), SMALL._replace(vocab=32768)), SWEEP),
    ],
    "wide": [
        Job("ce,dpo,dpo saved,dpo frozen,tdpo,kto,grpo*,jsd,sft + kl,token_stats", (SMALL,)),
        Job("logits: *", (SMALL._replace(hidden=0),)),
        Job("dpo", (SMALL._replace(prompt=0.5), SMALL._replace(logits="peaked")), PLAIN),
        Job("dpo", (SMALL._replace(rows=256), SMALL._replace(rows=1024), SMALL._replace(rows=2048)), SWEEP),
    ],
    "full": [Job("dpo,sft + kl,ce,token_stats", (FULL,))],
    "kept": [Job("support*", (Shape(512, 256, 896, 151936), Shape(2048, 512, 896, 151936)), "eager,fused_losses")],
    # What docs/explanation/performance.md wants of a CPU; with --busy the first row once more.
    "cpu": [
        Job("logits: token_stats", (SMALL._replace(hidden=0),), "eager,torch.compile,fused_losses"),
        Job("token_stats", (FULL,), "eager,fused_losses"),
    ],
    "common": [
        Job("ce,dpo,dpo frozen,tdpo,jsd,sft + kl*", tuple(Shape(n, 512, h, v, BF16) for n, h, v in COMMON)),
        Job("logits: *", tuple(Shape(8192, 512, 0, v, BF16) for v in (128256, 151936, 248320))),
        Job("dpo,jsd", (Shape(8192, 512, 4096, 128256, BF16, "peaked"),)),
    ],
    "gpu": [  # what matters first: time may run out
        Job("logits: logp + entropy,logits: *_kl,logits: alpha,logits: js,logits: tdpo", (Shape(8192, 512, 0, 151936, BF16),),
            PLAIN),
        Job("ce,dpo,dpo frozen,tdpo,jsd,token_stats", (Shape(8192, 512, 4096, 128256, BF16),)),
        Job("logits: logp + entropy,logits: forward_kl", tuple(Shape(8192, 512, 0, v, BF16) for v in (128256, 248320)), PLAIN),
        Job("dpo,sft + kl*", (Shape(8192, 512, 1024, 151936, BF16),), PLAIN),
        Job("dpo", _pairs((2048, 4), hidden=4096, vocab=128256, dtype=BF16), PLAIN),
        Job("logits: *", (Shape(8192, 512, 0, 151936, BF16),), "eager,fused_losses"),
        Job("logits: logp + entropy", (Shape(8192, 512, 0, 151936),), PLAIN),
    ],
    "small-h": [Job("dpo,jsd,sft + kl*", tuple(Shape(n, 512, h, v, BF16) for n, h, v in SMALL_H))],
    "pairs": [
        Job("dpo,dpo saved,kto", _pairs(*((t, b) for t in (512, 1024, 2048, 4096) for b in (2, 4, 8, 16)), hidden=4096,
                                        vocab=128256, dtype=BF16)),
    ],
}  # fmt: skip


def shrunk(shape: Shape) -> Shape:
    """The same kind of shape, small enough for Triton's interpreter; the vocabulary ends in the middle of every block."""
    return shape._replace(rows=8, length=4, hidden=min(shape.hidden, 32), vocab=517)


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Patterns, or one text of them with commas between; the case does not matter."""
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name.lower(), part.strip().lower()) for part in parts)


def shape_of(text: str, length: int, dtype: str, logits: str, prompt: float) -> Shape:
    """4096x512x50304 is rows, hidden, vocabulary; 4096x50304 rows and vocabulary, from logits."""
    sizes = [int(n) for n in text.split("x")] if re.fullmatch(r"\d+(x\d+){1,2}", text) else []
    if not sizes or sizes[0] % (2 * length):
        raise argparse.ArgumentTypeError(
            f"expected ROWSxHIDDENxVOCAB with rows a multiple of 2 x {length}, got {text!r}"
        )
    rows, *middle, vocab = sizes
    return Shape(rows, length, middle[0] if middle else 0, vocab, dtype, logits, prompt)


def plan(args: argparse.Namespace) -> list[tuple[Workload, Shape, list[Provider]]]:
    """What is to be measured, in order."""
    jobs = GRIDS[args.grid]
    if args.shapes:
        shapes = [shape_of(s, args.length, args.dtype, args.logits, args.prompt) for s in args.shapes]
        jobs = [Job("*", tuple(shapes))]
    planned: dict[tuple[str, Shape], tuple[Workload, Shape, list[Provider]]] = {}
    for job in jobs:
        for w in WORKLOADS:
            wanted = matches(w.name, job.workloads) and (not args.workloads or matches(w.name, args.workloads))
            for shape in map(shrunk, job.shapes) if args.shrink else job.shapes:
                if wanted and bool(shape.hidden) == w.hidden:
                    who = [p for p in providers() if p.name == "eager" or matches(p.name, job.providers)]
                    if args.providers:
                        who = [p for p in who if matches(p.name, args.providers)]
                    planned.setdefault((w.name, shape), (w, shape, who))  # jobs may overlap: the first counts
    return list(planned.values())


def params_of(shape: Shape) -> dict[str, Any]:
    logits = f"{shape.logits}, {shape.prompt:.0%} prompt" if shape.prompt else shape.logits
    return shape._asdict() | {"hidden": shape.hidden or None, "logits": logits}


def label(shape: Shape) -> str:
    return f"{shape} {shape.dtype} {params_of(shape)['logits']}"
