"""The README is short, its snippets run as they stand, its links exist, and its numbers are those of the raw results."""

import json
import re
from pathlib import Path

import fused_losses as fl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "bench" / "results" / "cpu"


def test_snippets_run(capsys):
    namespace: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)  # later ones build on earlier ones
    assert "tensor(" in capsys.readouterr().out


def test_it_is_short():
    assert 900 <= len(README.split()) <= 1200


def test_links_exist():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_functions_exist():
    for name in re.findall(r"`fl\.(\w+)", README):
        assert hasattr(fl, name), name


ROWS = {  # of the table of results: the file, the workload, and the providers of both columns
    "DPO, from hidden states": ("full", "dpo", "fused_losses", "eager"),
    "the same in 16 MiB": ("full", "dpo", "fused_losses, 16 MiB", None),
    "log-prob and forward KL": ("full", "sft + kl", "fused_losses", "eager"),
    "step of TRL's `DPOTrainer`": ("training", "step: dpo", "fused_losses DPOTrainer", "TRL DPOTrainer"),
    "the same, TRL itself inside `trl_kernels.patched()`": (
        "training", "step: dpo", "TRL DPOTrainer in trl_kernels.patched()", None
    ),
}  # fmt: skip


def measured(file, workload, provider):
    """Seconds and MiB of the largest vocabulary, as the table shows them."""
    runs = json.loads((RESULTS / f"{file}.json").read_text())["benchmarks"]
    found = [b for b in runs if b["group"].startswith(workload) and b["extra_info"]["provider"] == provider]
    run = max(found, key=lambda b: b["params"]["vocab"])
    return run["stats"]["median"], run["extra_info"]["peak_bytes"] / 2**20


def test_results_are_those_of_the_files():
    for name, (file, workload, *providers) in ROWS.items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", README, re.M)
        for cell, provider in zip(map(str.strip, row.split("|")), providers, strict=False):
            if provider is None:
                continue
            seconds, mib = (
                float(x.replace(",", "")) for x in re.fullmatch(r"([\d.,]+) s, ([\d.,]+) MiB", cell).groups()
            )
            time, memory = measured(file, workload, provider)
            assert abs(time - seconds) <= 0.051 * max(1, seconds / 10) and abs(memory - mib) <= 0.51, (name, provider)


def test_the_citation_is_of_this_version():
    fields = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M))
    assert (fields["type"], fields["title"], fields["version"]) == ("software", fl.__name__, fl.__version__)
