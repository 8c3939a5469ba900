"""What a user sees before any kernel runs: import, names, console script."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convit
from convit.cli import COMMANDS, main


def python(code: str, **kwargs) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs).stdout


def test_import_is_light():
    code = "import sys, convit; print([m for m in ('torch', 'numpy', 'mindspore', 'timm', 'triton') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_operations_are_registered_without_the_compiler():
    """Importing them registers what saved programs ask for; torch's compiler takes as long to import as torch, and stays away."""
    asked = "torch.ops.convit.gpsa, torch.ops.convit.gpsa_backward\nconvit.ConViT"
    assert python(f"import sys, torch, convit.ops\n{asked}\nprint('torch._dynamo' in sys.modules)").strip() == "False"


def test_public_names():
    for name in convit.__all__:
        assert callable(getattr(convit, name)), name
    with pytest.raises(AttributeError, match="no attribute 'gspa'"):
        convit.gspa  # noqa: B018


def test_kernels_are_never_imported_by_a_wrong_name(tmp_path):
    from convit import kernels

    (tmp_path / "kernels").symlink_to(kernels.__path__[0])
    for code in ("from kernels import get_kernel", "import kernels; kernels.get_kernel", "import kernels.gpsa"):
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert "this folder is" in result.stderr or "No module named 'kernels.gpsa'" in result.stderr, code
    look = "import kernels; assert not hasattr(kernels, '__version__')"  # as libraries do that ask whether another package is there
    subprocess.run([sys.executable, "-c", look], cwd=tmp_path, check=True)
    result = subprocess.run([sys.executable, "-c", "from kernels import gpsa"], cwd=tmp_path, capture_output=True, text=True)
    assert "this folder is the package convit.kernels and was imported as 'kernels'" in result.stderr


def test_extension_is_built():
    """The suite's own installation builds it; users without a compiler are told by `convit env`."""
    from convit import _C

    assert _C.instruction_set()


def convit_command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "convit", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def environment() -> dict:
    """What ``convit env --json`` tells of a fresh process."""
    return json.loads(convit_command("env", "--json").stdout)


def test_env_lists_each_backend_with_its_reason(environment, capsys):
    report = environment
    cpu = next(device for device in report["devices"] if device["framework"] == "torch")
    assert cpu["chosen"] in ("cpp", "sdpa")
    assert set(cpu["why_not"]) >= set(convit.backends())
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in convit.backends())
    assert f"instruction set {report['extension']['instruction set']}, " in text


def test_env_names_the_threads(environment):
    """Those that PyTorch runs; the C++ kernels are asked after it is loaded, since they use the same runtime."""
    torch = pytest.importorskip("torch")
    threads, told = environment["threads"], torch.__config__.parallel_info()
    assert threads["torch"] == torch.get_num_threads()
    if "parallel backend: OpenMP" in told:
        assert threads["runtime"].startswith("OpenMP ") and threads["runtime"] in told
        if sys.platform == "linux":
            assert threads["libraries"] and environment["extension"]["threads"] == "OpenMP"


@pytest.mark.parametrize("command", ["env", "plot", "infer"])
def test_of_several_processes_one_prints(command, monkeypatch, capsys):
    words = {"env": [], "plot": ["nowhere"], "infer": ["nowhere.png"]}[command]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([command, *words]) == (command != "env")
    told = capsys.readouterr()
    assert told.out if command == "env" else told.err.startswith(f"convit {command}: ")
    monkeypatch.setenv("RANK", "1")
    assert main([command, *words]) == 0
    assert capsys.readouterr() == ("", f"convit {command}: process 1 of 2 leaves this to process 0\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, tmp_path):
    pytest.importorskip("shtab")
    script = convit_command("completion", shell)
    assert script.returncode == 0, script.stderr
    assert all(command in script.stdout for command in COMMANDS) and "local_up_to_layer" in script.stdout
    if shell == "bash":
        (tmp_path / "convit.bash").write_text(script.stdout)
        (tmp_path / "RUN").mkdir()

        def complete(*words: str) -> list[str]:
            typed = " ".join(f'"{word}"' for word in words)
            code = f"source convit.bash; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_convit; echo ${{COMPREPLY[@]}}"
            return subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

        assert complete("convit", "val") == ["validate"]
        assert complete("convit", "plot", "--que") == ["--query"]
        assert complete("convit", "plot", "R") == ["RUN"]
        assert complete("convit", "train", "--framework", "") == ["pytorch", "mindspore"]
        assert complete("convit", "train", "--warmup_e") == ["--warmup_epochs"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = convit_command(command, "--help")
    assert result.returncode == 0 and "usage: convit" in result.stdout, result.stderr


@pytest.mark.parametrize("missing", ["PIL", "torch"])
def test_what_a_base_install_lacks_is_named(missing, tmp_path):
    """Commands without a package of the extras, or without PyTorch: a message with the way, never a traceback."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from convit.cli import main
(open("x.pth", "wb").close(), open("x.png", "wb").close())
for line in ("train --data_dir .", "validate --model convit_tiny --data_dir .", "infer x.png --pretrained", "plot x.pth --image x.png",
             "export convit_tiny --format torchscript", "serve x.pth", "completion bash"):
    if {missing!r} == "PIL" or line.split()[0] in ("export", "serve"):
        assert main(line.split()) == 1, line
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = told.stderr.splitlines()
    assert lines and all(re.search(rf"needs {missing}: pip install '\.\[\w+\]' in the source folder", line) for line in lines), told.stderr


def test_wrong_usage_exits_with_2():
    assert convit_command("trane").returncode == 2


def test_imports_run_one_way(tmp_path):
    """The contract in pyproject.toml holds, and an import up the stairs breaks it."""
    pytest.importorskip("importlinter")
    root = Path(convit.__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")

    def lint() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)

    shutil.copytree(root / "convit", tmp_path / "convit", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    assert "1 kept, 0 broken" in lint().stdout
    ops = tmp_path / "convit" / "ops.py"
    ops.write_text("import convit.engine.recipe\n" + ops.read_text())
    broken = lint()
    assert broken.returncode == 1 and "convit.ops is not allowed to import convit.engine" in broken.stdout


@pytest.mark.parametrize(
    "error", [AttributeError("x"), KeyError("shape"), IndexError(), OverflowError(), MemoryError(), ZeroDivisionError("by 0")]
)
def test_what_no_reader_foresaw_is_a_message(tmp_path, monkeypatch, capsys, error):
    """Never a traceback for a bad file: which file, what happened, and how to see more."""
    from convit import cli
    from convit.cli import convert

    def broken(*args, **kwargs):
        raise error

    (tmp_path / "a.pth").write_bytes(b"strange")
    monkeypatch.setattr(convert, "run", broken)
    monkeypatch.delenv("CONVIT_TRACEBACK", raising=False)
    assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "a.pth") in said and f"{type(error).__name__}" in said and "CONVIT_TRACEBACK=1" in said
    monkeypatch.setenv("CONVIT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")])
