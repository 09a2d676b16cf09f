"""python -m fused_losses hub: a folder that the package `kernels` loads, beside the installed package; offline."""

import ast
import os
import sys

import pytest
import torch
from helpers import python

import fused_losses as fl
from fused_losses.cli import hub
from fused_losses.nn.hub_layers import ForCausalLMLoss

USE = """
import sys
from pathlib import Path
import torch
import fused_losses as installed
import kernels

loaded = kernels.get_local_kernel(Path(sys.argv[1])) if sys.argv[2] == "path" else kernels.get_kernel("own/name", version=0)
assert loaded.__name__.startswith("fused_losses_") and loaded is not installed
z, w, y = torch.randn(4, 6, 9, requires_grad=True), torch.randn(4, 6, 9), torch.randint(9, (4, 6))
found = []
for library in (installed, loaded, installed):
    loss = library.dpo_loss(z, y, w, shift=True).loss
    found.append((loss, *torch.autograd.grad(loss, z)))
assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
step = torch.compile(lambda z: loaded.token_stats(z, y, shift=False).logps.sum(), backend="aot_eager", fullgraph=True)
torch.testing.assert_close(step(z), z.log_softmax(-1).gather(-1, y[..., None]).sum())
assert hasattr(torch.ops, loaded.__name__) and hasattr(getattr(torch.ops, loaded.__name__), "token_stats")

from torch import nn

class Head(nn.Module):
    def forward(self, hidden_states, lm_head_weight, labels, hidden_size, num_items_in_batch=None, ignore_index=-100,
                shift_labels=None, final_logit_softcapping=None, **kwargs):
        raise AssertionError("not replaced")

kernels.use_kernel_forward_from_hub("Loss")(Head)
here = kernels.LocalLayerRepository(repo_path=Path(sys.argv[1]), layer_name="ForCausalLMLoss")
with kernels.use_kernel_mapping({"Loss": {"cpu": here}}):
    head = kernels.kernelize(Head(), mode=kernels.Mode.TRAINING, device="cpu")
x, weight = torch.randn(2, 5, 8), torch.randn(9, 8, requires_grad=True)
loss = head(x, weight, y[:2, :5], 8)
torch.testing.assert_close(loss, nn.functional.cross_entropy((x @ weight.T)[:, :-1].flatten(0, 1), y[:2, 1:5].flatten()))
loss.backward()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "out"
    hub.write(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["path", "override"])
def test_it_loads_beside_the_installed_package(folder, how):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "LOCAL_KERNELS": f"own/name={folder}",
        "FUSED_LOSSES_BACKEND": "torch",
    }
    done = python("-c", USE, str(folder), how, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_only_torch_and_the_copy_itself_are_imported(folder):
    """At the top of a module; Triton where there is one, inside functions."""
    for path in (folder / hub.VARIANT).rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = {*sys.stdlib_module_names, "torch", *(["triton"] if "kernels" in path.parts else [])}
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_the_digest_is_of_the_files(folder):
    from kernels._rust import Digest, DigestAlgorithm, Metadata  # noqa: TID251 (that project)

    target = folder / hub.VARIANT
    metadata = Metadata.read_from_file(target / "metadata.json")
    assert metadata.digest.files == Digest.hash_variant(DigestAlgorithm.SHA256, target).files
    assert metadata.name.python_name == fl.__name__ and metadata.id.startswith("fused_losses_")


def test_a_folder_that_exists_is_kept(folder):
    with pytest.raises(ValueError, match="out: expected the path of a folder to make"):
        hub.write(folder)


def test_the_layer_is_the_loss_of_a_causal_model():
    x, weight, ids = torch.randn(2, 5, 8), torch.randn(9, 8), torch.randint(9, (2, 5))
    layer, z = ForCausalLMLoss(), x @ weight.T
    each = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(layer(x, weight, ids, 8), each.mean())
    torch.testing.assert_close(layer(x, weight, ids, 8, num_items_in_batch=20), each.sum() / 20)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(layer(x, weight, None, 8, shift_labels=shifted.flatten()), each.mean())
    with pytest.raises(TypeError, match="return_predicted_tokens: is not computed"):
        layer(x, weight, ids, 8, return_predicted_tokens=True)
