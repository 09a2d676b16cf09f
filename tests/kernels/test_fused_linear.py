"""The tile kernel: states and terms of rows straight from hidden states and head weights, logits never in memory."""

import json
import os
from pathlib import Path

import pytest
import torch
import traffic
from helpers import python, relative

import fused_losses as fl
from fused_losses import divergences
from fused_losses.core import moments
from fused_losses.core.layout import HiddenRows, LowRankRows, Outputs, StatsSpec, saved_rows

launch = pytest.importorskip("fused_losses.kernels.launch")
from fused_losses.kernels import configs  # noqa: E402

ROOT = Path(__file__).parents[2]
ON_CPU = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts bytes in Triton's interpreter")
KLS = ["reverse_kl", "forward_kl"]


def hidden(rows, width, vocab, device, dtype=torch.float32, bias=False, rank=0, scale=2.0):
    """(x, weight, bias, (a, b, scaling)) of one side; x with a row stride of its own."""
    x = (torch.randn(rows, width + 3, device=device)[:, :width] * scale / width**0.5).to(dtype)
    weight = torch.randn(vocab, width, device=device).to(dtype)
    lora = None
    if rank:
        lora = (
            (torch.randn(rank, width, device=device) * 0.3).to(dtype),
            torch.randn(vocab, rank, device=device).to(dtype),
            0.5,
        )
    return x, weight, torch.randn(vocab, device=device).to(dtype) if bias else None, lora


def ours(policy, labels, ref, names=(), sums=True, valid=None, heads=(None, None), scale=1.0, splits=None, first=0):
    """TokenStats in a dictionary, from tile_states, close and tile_terms."""
    problem = StatsSpec(
        divergences.parse(names),
        sums,
        sums,
        False,
        -100,
        valid or len(policy[1]),
        heads[0] or 0.0,
        scale,
        heads[1] or 0.0,
        scale,
        first,
    )
    low_rank = lambda x, lora: lora and LowRankRows(x @ lora[0].T, lora[1], lora[2])  # noqa: E731
    side = lambda s: s and HiddenRows(*s[:3], low_rank(s[0], s[3]))  # noqa: E731
    p, q, n, m = side(policy), side(ref), len(labels), len(problem.divergences)
    powers = len({d.power for d in problem.divergences if d.power is not None})
    new = lambda *shape: torch.full(shape, float("nan"), device=labels.device)  # noqa: E731
    state = new(moments.fields(powers), n)
    launch.tile_states(problem, p, labels, q, state, splits)
    assert state[:, labels == -100].isnan().all()
    logps, ref_logps, lse, div, saved = new(n), new(n), new(n), new(m, n), new(saved_rows(m), n)
    h, squares, hit = new(n), new(n), torch.ones(n, dtype=torch.bool, device=labels.device)
    outputs = Outputs(
        logps,
        ref_logps if q else None,
        lse,
        h if sums else None,
        div if m else None,
        hit,
        squares if sums else None,
        saved,
    )
    launch.close(problem, state, labels, outputs)
    out = {"logps": logps, "lse": lse, "correct": hit}
    if sums:
        out |= {"entropy": h, "collision": squares}
    if q:
        out["ref_logps"] = ref_logps
    if any(d.term is not None for d in problem.divergences):
        found = torch.zeros(2 * m, n, device=labels.device)
        launch.tile_terms(problem, p, labels, q, saved, found, splits)
        div = torch.where(torch.tensor([[d.term is not None] for d in problem.divergences]), found[::2], div)
    return out | {d.key: div[i] for i, d in enumerate(problem.divergences)}


def truth(policy, labels, ref, names=(), sums=True, valid=None, heads=(None, None), scale=1.0):
    def source(side, cap):
        x, weight, bias, lora = side
        lora = lora and fl.Lora(lora[0].double(), lora[1].double(), lora[2])
        bias = None if bias is None else bias.double()
        return fl.Hidden(x.double(), weight.double(), bias, softcap=cap, scale=scale, valid_vocab=valid, lora=lora)

    stats = fl.reference.token_stats(
        source(policy, heads[0]),
        labels,
        ref and source(ref, heads[1]),
        divergence=names or None,
        entropy=sums,
        collision=sums,
        shift=False,
    )
    out = {"logps": stats.logps, "lse": stats.lse, "correct": stats.correct} | stats.divergence
    return out | {k: v for k in ("entropy", "collision", "ref_logps") if (v := getattr(stats, k)) is not None}


def compare(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "correct":
            assert torch.equal(found[name], value)
        else:
            assert found[name].isfinite().all(), name
            error = relative(found[name], value)
            if name == "lse":  # a logarithm: of rows whose sum is near 1, the error is not relative to it
                error *= min(1.0, value.norm().item())
            assert error <= tolerance, f"{name}: {error:.1e}"


def labels_for(rows, valid, device):
    labels = torch.randint(0, valid, (rows,), device=device)
    labels[1::3] = -100
    return labels


SHAPES = [(1, 1, 1, 1), (1, 1, 7, 2), (3, 64, 128, 1), (66, 33, 150, 2), (17, 5, 300, 3)]  # N, H, V, splits
# The dtype matters as a tile is loaded, where there are whole steps and a rest, and nowhere else.
SIZED = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[3], torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), SIZED, ids=str)
def test_one_side(device, shape, dtype):
    n, h, v, splits = shape
    policy, labels = hidden(n, h, v, device, dtype), labels_for(n, v, device)
    compare(ours(policy, labels, None, splits=splits), truth(policy, labels, None), 2e-6)
    if n < 10:
        compare(ours(policy, labels, None, sums=False, splits=splits), truth(policy, labels, None, sums=False), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), SIZED, ids=str)
def test_pair_of_different_widths(device, shape, dtype):
    n, h, v, splits = shape
    policy, ref = hidden(n, h, v, device, dtype), hidden(n, h + 9, v + 4, device, dtype, scale=1.5)
    labels = labels_for(n, v, device)
    names = divergences.names() if n == 3 else [*KLS, "alpha", "js"]
    args = (policy, labels, ref, names if v > 1 else KLS)
    compare(ours(*args, valid=v, splits=splits), truth(*args, valid=v), 2e-5)
    if n < 10:
        compare(ours(*args[:3], valid=v, splits=splits), truth(*args[:3], valid=v), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 40])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_head_options(device, rank, softcap):
    """Bias, LoRA, softcap, scale, padded vocabulary, each side its own."""
    policy = hidden(9, 20, 290, device, bias=True, rank=rank)
    ref = hidden(9, 17, 300, device, bias=not rank, scale=1.0)
    labels = labels_for(9, 280, device)
    options = dict(valid=280, heads=(softcap, None if rank else 3.0), scale=0.7)
    args = (policy, labels, ref, [*KLS, "js"])
    compare(ours(*args, **options, splits=2), truth(*args, **options), 1e-5)


def test_bfloat16(device):
    """Products are exact in float32; only the interpreter's own conversion of bf16 is in doubt."""
    policy, ref = (hidden(20, 50, 200, device, torch.bfloat16) for _ in range(2))
    labels = labels_for(20, 200, device)
    compare(ours(policy, labels, ref, KLS), truth(policy, labels, ref, KLS), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "allowed", "offset"), [(0.11, 4e-5, 0.0), (9e-4, 6e-3, 7.3), (1e-4, 1e-2, 0.0)])
def test_near_the_reference(device, monkeypatch, noise, allowed, offset):
    """The bounds of tests/engine/test_numerics.py, where logits are read from memory; X = 1 makes the products exact."""
    monkeypatch.setattr(configs, "TILE_FLOAT32", configs.TILE_FLOAT32._replace(rows=16, depth=16))
    n, v = 4, 4096
    z = torch.randn(n, v, device=device)
    w = z + noise * torch.randn(n, v, device=device) + offset
    policy, ref = ((torch.eye(n, device=device), x.T.contiguous(), None, None) for x in (z, w))
    labels = torch.randint(0, v, (n,), device=device)
    names = [*KLS, "alpha", "js"]
    found = ours(policy, labels, ref, names, splits=2)
    expected = fl.reference.token_stats(z.double(), labels, w.double(), divergence=names, shift=False).divergence
    for name in names:
        error = ((found[name] - expected[name]) / expected[name]).abs().max().item()
        assert (found[name] >= 0).all() and error <= (2 * allowed if offset else allowed), f"{name}: {error:.1e}"


def test_suppressed_tokens_and_slices(device):
    """A bias of -inf; the vocabulary in two calls, merged; a row without its label in one of them."""
    policy, ref = (hidden(6, 8, 150, device, bias=True) for _ in range(2))
    policy[2][:80], ref[2][:70] = -float("inf"), -float("inf")
    labels = torch.tensor([149, 85, 120, -100, 99, 140], device=device)
    names = ["reverse_kl", "forward_kl"]
    found = ours(policy, labels, ref, names, splits=3)
    expected = truth(policy, labels, ref, names)
    assert found["forward_kl"][labels >= 0].isinf().all() and expected["forward_kl"][labels >= 0].isinf().all()
    for name in ("logps", "ref_logps", "lse", "entropy", "collision", "reverse_kl"):
        assert relative(found[name], expected[name]) <= 1e-5, name

    problem = StatsSpec(divergences.parse(names), True, True, False, -100, 100, 0.0, 1.0, 0.0, 1.0)
    whole, left, right = (torch.zeros(moments.fields(0), 6, device=device) for _ in range(3))
    for state, c in ((whole, slice(0, 150)), (left, slice(0, 100)), (right, slice(100, 150))):
        sides = [HiddenRows(s[0], s[1][c], s[2][c], None) for s in (policy, ref)]
        launch.tile_states(problem._replace(vocab=c.stop - c.start, first=c.start), sides[0], labels, sides[1], state)
    launch.merge_states(problem, left, right)
    *out, squares = (torch.zeros(6, device=device) for _ in range(5))
    for state in (whole, left):
        div, saved = torch.zeros(2, 6, device=device), torch.zeros(saved_rows(2), 6, device=device)
        hit = torch.zeros(6, dtype=torch.bool, device=device)
        launch.close(problem._replace(vocab=150), state, labels, Outputs(*out, div, hit, squares, saved))
        named = zip(("logps", "ref_logps", "lse", "entropy", "collision"), [*out, squares], strict=True)
        for name, value in named:
            assert relative(value, expected[name]) <= 1e-5, name
        assert relative(div[0], expected["reverse_kl"]) <= 1e-5


@pytest.mark.slow
def test_groups_of_row_blocks(device, monkeypatch):
    """Three blocks in groups of two: every row and range is someone's."""
    monkeypatch.setattr(configs, "TILE_FLOAT32", configs.Tile(16, 32, 16, 4, 2))
    monkeypatch.setattr(configs, "GROUP_BYTES", 2 * 16 * 4 * 6)
    policy, ref = (hidden(41, 3, 90, device) for _ in range(2))
    labels = torch.randint(0, 90, (41,), device=device)
    compare(ours(policy, labels, ref, KLS, splits=3), truth(policy, labels, ref, KLS), 1e-5)
    whole = ours(policy, labels, ref, KLS)
    assert all(torch.equal(x, whole[name]) for name, x in ours(policy, labels, ref, KLS).items())  # same bits again


def test_out_of_range_and_nothing(device):
    policy = hidden(4, 5, 20, device)
    found = ours(policy, torch.tensor([3, 20, -7, -100], device=device), None)
    assert found["logps"].isnan().tolist() == [False, True, True, False]
    found = ours(policy, torch.full((4,), -100, device=device), None)
    assert all((x == 0).all() for x in found.values())


def test_splits_fill_the_device():
    for blocks, columns, group in ((1, 501, 16), (64, 501, 16), (7, 3, 16), (512, 1002, 4), (1, 1, 1)):
        splits = launch.tile_splits(blocks, columns, group, 132)
        per = -(-columns // splits)
        assert 1 <= splits <= columns and (splits - 1) * per < columns
        assert min(blocks, group) * splits >= min(100, min(blocks, group) * columns)
        assert -(-blocks * splits // 132) * per <= 1.15 * blocks * columns / 132 + 1


@pytest.mark.slow
@ON_CPU
@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_traffic(device, ref, splits):
    """R row blocks read the weights R times, C tile columns the hidden states C times. Small: bias, labels, states to merge."""
    n, h, v, valid = 135, 96, 1000, 900
    policy = hidden(n, h, v, device, torch.float16, bias=True)
    other = hidden(n, 2 * h, v, device, torch.float16) if ref else None
    problem = StatsSpec(divergences.parse(KLS if ref else None), True, ref, False, -100, valid, 0.0, 1.0, 0.0, 1.0)
    config = launch.tile_config(problem, torch.float16, ref, False)
    labels = torch.randint(0, valid, (n,), device=device)
    labels[::5] = -100  # their hidden states are not read
    fields = moments.fields(0)
    with traffic.count() as seen:
        sides = (s and HiddenRows(*s) for s in (policy, other))
        launch.tile_states(problem, next(sides), labels, next(sides), torch.zeros(fields, n, device=device), splits)
    blocks, columns = -(-n // config.rows), -(-valid // config.columns)
    width = h + (2 * h if ref else 0)
    expected = 2 * width * (blocks * valid + columns * int((labels != -100).sum()))
    expected += 2 * blocks * valid + 8 * n * splits + 2 * 4 * fields * n * (splits - 1)
    assert seen.read == expected
    assert seen.written <= 2 * 4 * fields * n * splits


TARGETS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of shared memory
MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCHMMA",)}


def compile_all():
    """Facts of the machine code of each case, in a process where nothing is interpreted."""
    import re

    import machine_code as mc

    facts = []
    for target in TARGETS:
        more = (((), False, True), (["js", "alpha"], True, True)) if target == "sm_90" else ()
        usual = (((), False, False), (KLS, True, False))
        for (names, ref, lora), squares in (*((c, False) for c in (*usual, *more)), *((c, True) for c in usual)):
            policy = hidden(16, 64, 16, "cpu", torch.bfloat16, bias=lora, rank=16 if lora else 0)
            policy = (torch.zeros(16, 64, dtype=torch.bfloat16), *policy[1:])
            if lora:
                policy = (*policy[:3], LowRankRows(torch.zeros(16, 16, dtype=torch.bfloat16), policy[3][1], 0.5))
            policy = HiddenRows(*policy)
            other = HiddenRows(policy.x, policy.weight, None, None) if ref else None
            problem = StatsSpec(divergences.parse(names or None), not ref, squares, False, -100, 16, 0.0, 1.0, 0.0, 1.0)
            labels = torch.zeros(16, dtype=torch.int64)
            m = len(problem.divergences)
            with mc.compiled(target) as kernels:
                launch.tile_states(problem, policy, labels, other, torch.zeros(moments.fields(1), 16), 1)
                if "js" in names:
                    launch.tile_terms(
                        problem, policy, labels, other, torch.zeros(saved_rows(m), 16), torch.zeros(2 * m, 16), 1
                    )
            for kernel in kernels:
                fact = {"target": target, "names": list(names), "lora": lora, "shared": kernel.metadata.shared}
                if target == "gfx942":
                    code = kernel.asm["amdgcn"]
                    fact["spills"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
                    fact["matrix"] = code.count("v_mfma")
                else:
                    opcodes = [
                        f.group(1) for line in mc._disassemble(kernel).splitlines() if (f := mc._LINE.match(line))
                    ]
                    fact["spills"] = sum(o.startswith(("LDL", "STL")) for o in opcodes)
                    fact["matrix"] = sum(o.startswith(MATRIX[target]) for o in opcodes)
                    fact["wide"] = any(o.startswith("LDGSTS") and ".128" in o for o in opcodes)
                facts.append(fact)
    return facts


def test_tiles_by_what_they_keep_in_registers(monkeypatch):
    """The interpreter takes those of sm_80, whatever the version of Triton; newer versions have their own for some devices."""
    tiles = configs.TILES["sm_80"]
    plain = StatsSpec((), False, False, False, -100, 64, 0.0, 1.0, 0.0, 1.0)
    monkeypatch.setattr(launch, "INTERPRET", launch.INTERPRET.__class__(True))

    def chosen(ref, second=False, **changes):
        return launch.tile_config(plain._replace(**changes), torch.bfloat16, ref, second)

    assert chosen(False) == tiles.one and chosen(False, entropy=True) == tiles.one_entropy and chosen(True) == tiles.two
    assert all(chosen(True, **{name: 30.0}) == tiles.two_softcap for name in ("softcap", "ref_softcap"))
    more = [{"divergences": divergences.parse("alpha"), "softcap": 30.0}, {"second": True}]
    more.append({"divergences": divergences.parse("reverse_kl"), "entropy": True})
    assert all(chosen(True, **changes) == tiles.two_more for changes in more)
    assert launch.tile_config(plain, torch.float32, True, False) == configs.TILE_FLOAT32
    for version in ((3, 7), (3, 8)):
        monkeypatch.setattr(launch, "TRITON_VERSION", version)
        new = configs.SINCE_TRITON_3_8 if version >= (3, 8) else {}
        assert chosen(True) == new.get("sm_80", tiles).two
    assert set(configs.SINCE_TRITON_3_8) <= set(configs.TILES)


@pytest.mark.slow
def test_machine_code():
    """Matrix units are used on every target, no register spills where it counts, everything fits into shared memory."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_LOSSES_BACKEND")}
    env["PYTHONPATH"] = os.pathsep.join(
        str(ROOT / folder) for folder in (".", "bench", "tests/support", "tests/kernels")
    )
    code = "import json, test_fused_linear as t; print(json.dumps(t.compile_all()))"
    done = python("-c", code, cwd="/", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts) == 4 * len(TARGETS) + 3
    for fact in facts:
        assert fact["matrix"] > 0 and fact.get("wide", True), fact
        assert fact["shared"] <= TARGETS[fact["target"]] << 10, fact
        if not fact["lora"]:
            assert fact["spills"] == 0, fact
    assert configs.TILES.keys() == {"sm_80", "sm_90", "sm_100", "hip"}
