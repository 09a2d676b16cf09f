"""What gets installed: one top-level package, each file once, the same from a checkout, an sdist and a wheel."""

import importlib.util
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import python

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
SOURCES = ["fused_losses", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
IMPORT_ALL = f"""
import importlib, fused_losses
print(fused_losses.__file__)
for name in {KERNELS}:
    print(importlib.import_module("fused_losses.kernels." + name).__file__)
"""
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="kernels need Triton")


def run(code, cwd, pythonpath=None):
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if pythonpath:
        env["PYTHONPATH"] = str(pythonpath)
    done = python("-c", code, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def build(kind, tree, out):
    """Run the build backend itself: no isolated environment, hence no network."""
    return out / run(f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))", tree)[-1]


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing in the checkout and finds nothing stale there."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


def test_wheel_has_every_file_once(wheel):
    package = ROOT / "fused_losses"
    files = [*package.rglob("*.py"), *package.glob("cli/data/*.jsonl"), package / "py.typed"]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f"fused_losses/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert contents(wheel) == sorted(expected)


def test_wheel_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fused_losses"}


def test_wheel_version(wheel):
    version = run("import fused_losses; print(fused_losses.__version__)", ROOT)[-1]
    assert wheel.name == f"fused_losses-{version}-py3-none-any.whl"


def test_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    sdist = build("sdist", tree, tmp_path)
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[-1] for name in archive.getnames()]
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    modules = sorted(name for name in names if "kernels/" in name and name.endswith(".py"))
    assert modules == [f"kernels/{name}.py" for name in KERNELS]
    assert contents(build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)) == contents(wheel)


@needs_triton
def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for file in run(IMPORT_ALL, tmp_path, pythonpath=site):
        assert Path(file).is_relative_to(site)


@needs_triton
def test_imports_inside_the_checkout():
    for file in run(IMPORT_ALL, ROOT):
        assert Path(file).resolve().parent in (ROOT / "fused_losses", ROOT / "kernels")


def test_import_needs_torch_alone():
    code = "import sys, fused_losses; print(*sorted({'triton', 'transformers'} & set(sys.modules)))"
    assert run(code, ROOT)[-1] == ""


def test_import_kernels_is_not_ours():
    """From the root, `kernels` is the package of that name if there is one, else a bare namespace."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import kernels; print(getattr(kernels, '__file__', None) or '')"
    assert Path(run(code, ROOT)[-1]).parent != ROOT / "kernels"
