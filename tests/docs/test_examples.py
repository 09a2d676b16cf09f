"""The examples run as they stand and say what they claim; where a loss is wrong they fail."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import python

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# What each of them says at its end.
CLAIMS = {
    "plain_loop": r"forward and backward: \d+ MiB before, \d+ MiB after",
    "trl_dpo": r"rewards/margins +TRL -?\d\.\d+ +ours",
    "tr_dpo": r"step 8: margin -?0\.0000$",
    "tdpo": r"step 5: loss 0\.\d+, KL of chosen answers",
    "kto": r"written out 0\.\d+\), margin [1-9]",
    "grpo": r"step 3: loss -0\.\d+ \(written out -0\.\d+\), KL 0\.\d+, clipped",
    "distillation": r"forward and backward: \d MiB \(written out \d\d\)",
    "lora": r"the adapter has learnt, the reference has stayed",
    "saved_reference": r"refused: .* the log-probs are stale; .* model: 21 weights are others",
    "pm_rlhf": r"only preference matching ends at softmax\(reward\)$",
    "f_dpo": r"in this order: more KL at the same margin; reverse KL has the lowest entropy$",
    "upo": r"UPO follows the auxiliary rewards and the preferences; KTO the preferences alone$",
    "lta_thinker": r"the variance of thoughts over questions has grown \d+\.\d times$",
}
PACKAGES = {"trl_dpo": "trl", "lora": "peft"}
WRONG = {
    "plain_loop": "dpo",
    "tdpo": "tdpo",
    "kto": "kto",
    "grpo": "grpo",
    "distillation": "distillation",
    "pm_rlhf": "preference_matching",
    "f_dpo": "dpo",
    "upo": "upo",
    "lta_thinker": "lta_thinker",
}
TWO = {
    "vocabulary_parallel": r"rank 0: 300 of 1000 tokens, loss (\d\.\d+), in one process \1",
    "fsdp2": r"rank 1: \[500, 48\] of the head, tdpo (\d\.\d+), in one process \1",
}

# Of the scripts that want one process all run in one, for to import torch takes longer than any of them.
RUNNER = """
import dataclasses, runpy, sys, traceback
import fused_losses as fl

sys.path.insert(0, "examples")


def run(title, name):
    print("==", title)
    try:
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
        print("-- done")
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        print("--", type(error).__name__)


def spoil(function):
    def spoilt(*args, **options):
        out = function(*args, **options)
        return dataclasses.replace(out, loss=1.01 * out.loss)

    return spoilt


for word in sys.argv[1:]:
    name, _, loss = word.partition(":")
    if loss:
        loss += "_loss"
        before = getattr(fl, loss)
        setattr(fl, loss, spoil(before))
        run(word, name)
        setattr(fl, loss, before)
    else:
        run(word, name)
"""


def names():
    return [name for name in CLAIMS if find_spec(PACKAGES.get(name, "torch"))]


def run(*words):
    return python(*words, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.fixture(scope="module")
def said():
    """What each script has printed, by its name; and by "name:loss", with that loss spoilt."""
    done = run("-c", RUNNER, *names(), *(f"{name}:{loss}" for name, loss in WRONG.items()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(re.findall(r"^== (\S+)\n(.*?)(?=^== |\Z)", done.stdout, re.M | re.S))


@pytest.mark.parametrize("name", CLAIMS)
def test_one_process(name, said):
    if name not in names():
        pytest.skip(f"needs {PACKAGES[name]}")
    assert said[name].endswith("-- done\n"), said[name]
    assert re.search(CLAIMS[name], said[name], re.M), said[name]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_is_noticed(name, said):
    assert said[f"{name}:{WRONG[name]}"].endswith("-- AssertionError\n"), said[f"{name}:{WRONG[name]}"]


@pytest.mark.parametrize("name", TWO)
def test_two_processes(name):
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"examples/{name}.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert re.search(TWO[name], done.stdout), done.stdout


def test_each_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"tiny", *CLAIMS, *TWO}
