"""Installing without a compiler, and the completeness of the source distribution."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tracked files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    pytest.importorskip("pybind11")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_symlink():
            (tmp_path / "copy" / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def build(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no /bin/false")
def test_a_missing_compiler_breaks_nothing_and_leaves_no_stale_library(checkout):
    stale = checkout / "convit" / "_C.stale.so"
    no_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
    stale.touch()
    result = build(checkout, "build_ext", "--inplace", CONVIT_BUILD_EXT="auto", **no_compiler)
    assert result.returncode == 0 and "the C++ kernels were not built" in result.stderr
    assert not stale.exists()
    result = build(checkout, "build_ext", "--inplace", CONVIT_BUILD_EXT="1", **no_compiler)
    assert result.returncode != 0
    stale.touch()
    assert build(checkout, "--name", CONVIT_BUILD_EXT="0").returncode == 0
    assert not stale.exists()
    assert "must be auto, 0 or 1, got 'yes'" in build(checkout, "--name", CONVIT_BUILD_EXT="yes").stderr
    code = "from convit.cli.env import collect; print(collect()['extension']['state'])"
    # -S: without site-packages, where an editable install would lend its own library
    told = subprocess.run([sys.executable, "-S", "-c", code], cwd=checkout, capture_output=True, text=True)
    assert told.stdout.startswith("not built: install a C++17 compiler"), told.stdout + told.stderr


def test_source_distribution_is_complete(checkout):
    result = build(checkout, "sdist", CONVIT_BUILD_EXT="1")
    assert result.returncode == 0, result.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    outside = {".gitignore", ".dockerignore", ".ci/run"}
    own = {f"convit/{name}" if name.startswith("kernels/") else name for name in tracked}  # the kernels travel once, where the link leads
    missing = {name for name in own - packed - outside if not name.startswith(("dist/", "convit.egg-info/", "bench/results/", ".github/"))}
    assert not missing
    assert not {name for name in packed if name.startswith("kernels/")}
    with tarfile.open(archive) as tar:
        about = tar.extractfile(next(name for name in tar.getnames() if name.endswith("/PKG-INFO")))
        assert about is not None
        links = re.findall(r"\]\(([^)]*)\)", about.read().decode())
    assert links and all(link.startswith("https://") for link in links)


def test_a_wheel_carries_kernels_types_and_recipes(checkout, tmp_path):
    """Installed beside nothing else, a user's project sees full signatures, and every part of the package is there."""
    result = build(checkout, "bdist_wheel", "--dist-dir", str(tmp_path), CONVIT_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    packed = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    sources = {f"convit/{path.relative_to(ROOT / 'convit')}" for path in (ROOT / "convit").rglob("*.py")}
    sources |= {f"convit/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert sources <= packed
    assert {"convit/py.typed", "convit/engine/recipes/digits.yaml", "convit/kernels/gpsa/README.md"} <= packed
    pytest.importorskip("mypy")
    stubs = tmp_path / "stubs" / "torch"  # what a signature names of it: mypy takes half a minute to read all of torch
    stubs.mkdir(parents=True)
    (stubs / "__init__.pyi").write_text("from typing import Any\nclass Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n")
    user = tmp_path / "user.py"
    user.write_text("import convit\nreveal_type(convit.gpsa)\nreveal_type(convit.GPSA(48, 4).forward)\n")
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--no-site-packages", "--ignore-missing-imports", str(user)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": f"{stubs.parent}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
    )
    assert "gating: torch.Tensor, grid: tuple[int, int], *, scale:" in told.stdout, told.stdout
    assert "def (x: torch.Tensor, grid: tuple[int, int] | None =) -> torch.Tensor" in told.stdout


HUB = """
import sys, torch
folder = sys.argv[1]
given = {"source": "local", "num_classes": 3, "img_size": 32}
print(torch.hub.load(folder, "convit_tiny", **given)(torch.zeros(1, 3, 32, 32)).shape[1], sys.modules["convit"].__file__)
from importlib import util
spec = util.spec_from_file_location("hubconf", folder + "/hubconf.py")
module = util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*(name for name in vars(module) if name[0] != "_" and callable(getattr(module, name))))
"""


def test_torch_hub_finds_the_variants(checkout, tmp_path):
    """In what it unpacks of a repository's archive, where links are text files: the installed convit serves, and there must be one."""
    pytest.importorskip("torch")
    import convit

    (checkout / "convit" / "kernels").unlink()
    (checkout / "convit" / "kernels").write_text("../kernels")
    told = subprocess.run([sys.executable, "-c", HUB, str(checkout)], cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout == f"3 {convit.__file__}\n{' '.join(convit.list_models())}\n", told.stderr
    # -S: without site-packages
    told = subprocess.run([sys.executable, "-S", str(checkout / "hubconf.py")], cwd=tmp_path, capture_output=True, text=True)
    assert told.stderr.endswith("ModuleNotFoundError: torch.hub finds these models where convit is installed: pip install it first\n")
