"""The copy of the tree that ``tests/mutate.py`` plants mistakes in: its environment, its builds, and which tests run which line of it.

The copy has an interpreter of its own that finds the copy first, in whatever process a test starts. Which test runs which line comes
from one run of the suite under coverage, in which every process that a test starts says whose it is.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# what a run of the suite leaves out: tests that read the tree or build it elsewhere, and those that wait for a compiler or an interpreter
# for minutes and are named by file where they matter
UNTRACED = (
    "test_install.py",
    "test_docs.py",
    "test_triton.py",
    "test_triton_aot.py",
    "test_gpu_rehearsal.py",
    "test_npu.py",
    "test_compile.py",
)


def tracked(root: Path = ROOT) -> list[str]:
    return [n for n in subprocess.check_output(["git", "ls-files", "-z"], cwd=root, text=True).split("\0") if n and (root / n).exists()]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


class Workshop:
    def __init__(self, folder: Path) -> None:
        """Makes the copy, or brings the one that is there up to date: a file that is the same keeps its time, and its compiled form."""
        self.folder = folder
        names = tracked()
        for old in set(tracked(folder) if (folder / ".git").exists() else []) - set(names):
            (folder / old).unlink()
        for name in names:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                if not target.is_symlink():
                    target.symlink_to(os.readlink(source))
            elif not target.exists() or target.read_bytes() != source.read_bytes():
                shutil.copyfile(source, target)
        if not (folder / ".git").exists():
            subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
        self.python = self.interpreter()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CONVIT_BUILD_EXT": "1"}
        self.environment.pop("PYTHONPATH", None)

    def interpreter(self) -> Path:
        """A virtual environment with this one's packages, but the copy before them."""
        home = self.folder / "build/venv"
        python = home / "bin/python3"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
            packages = next(home.glob("lib/python*/site-packages"))
            outside = [p for p in sys.path if p.endswith("-packages")]
            coverage = "import os; os.environ.get('COVERAGE_PROCESS_START') and __import__('coverage').process_startup()"
            (packages / "workshop.pth").write_text("\n".join([str(self.folder), *outside, coverage, ""]))
            for script in Path(sys.executable).parent.iterdir():
                target = python.parent / script.name
                if not target.exists() and script.is_file() and script.read_bytes()[:2] == b"#!":
                    target.write_text(re.sub(r"\A#!.*python.*", f"#!{python}", script.read_text()))
                    target.chmod(0o755)
        return python

    def build(self) -> bool:
        """Compile all of it, keep the result, and note how each file is compiled."""
        command = [sys.executable, "setup.py", "-v", "build_ext", "--inplace", "--force"]
        shown = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        lines = [shlex.split(line) for line in (shown.stdout + shown.stderr).splitlines() if re.match(r"\S*(g\+\+|gcc|cc|clang\S*) ", line)]
        (self.folder / "build/commands.json").write_text(json.dumps(lines))
        for part in (*(self.folder / "build").glob("lib.*"), *(self.folder / "build").glob("temp.*")):
            shutil.copytree(part, self.folder / "build/clean" / part.name, dirs_exist_ok=True)
        return shown.returncode == 0

    def build_changed(self, changed: str) -> bool:
        """Compile what includes ``changed``. What every instruction set compiles for itself (``*.inc.h``): for the one that runs here."""
        *compiles, link = json.loads((self.folder / "build/commands.json").read_text())
        for command in compiles:
            name = command[command.index("-c") + 1]
            if changed.endswith(".inc.h") and not name.endswith(f"_{self.instruction_set}.cpp"):
                continue
            needs = subprocess.run(["g++", "-MM", "-Icsrc", "-std=c++17", name], cwd=self.folder, capture_output=True, text=True).stdout
            includes = Path(name).name == Path(changed).name or f"/{Path(changed).name}" in needs
            if "-c" in command and includes and subprocess.run(command, cwd=self.folder, capture_output=True).returncode:
                return False
        linked = subprocess.run(link, cwd=self.folder, capture_output=True).returncode == 0
        return linked and self.install(self.folder / link[link.index("-o") + 1])

    def install(self, library: Path) -> bool:
        """As a new file: one that is in use is left to those who have it open."""
        target = self.folder / "convit" / library.name
        target.unlink(missing_ok=True)
        shutil.copy2(library, target)
        return True

    def restore(self) -> None:
        """The objects and the library as they are without a mistake."""
        for kept in (self.folder / "build/clean").rglob("*.o"):
            shutil.copy2(kept, self.folder / "build" / kept.relative_to(self.folder / "build/clean"))
        for library in (self.folder / "build/clean").rglob("_C.*"):
            self.install(library)

    @functools.cached_property
    def instruction_set(self) -> str:
        code = "from convit.kernels.gpsa import cpu_cpp; print(cpu_cpp.describe()['instruction set'])"
        return subprocess.check_output([str(self.python), "-c", code], cwd="/", env=self.environment, text=True).strip()

    def __enter__(self) -> "Workshop":
        state, kept = "".join(digest(f) for f in sorted((self.folder / "csrc").iterdir())), self.folder / "build/clean/state"
        if not kept.exists() or kept.read_text() != state:
            if not self.build():
                raise RuntimeError("the C++ kernels do not build")
            kept.write_text(state)
        self.restore()
        command = [str(self.python), "tests/workshop.py"]
        self.server = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def test(self, tests: list[str], seconds: float, stop: bool = True) -> dict:
        """Run these tests, in this order: the exit status (None: time was up), the first that failed, and all of those."""
        assert self.server.stdin and self.server.stdout
        print(json.dumps({"tests": tests, "seconds": seconds, "stop": stop}), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def reach(self) -> dict:
        """Seconds of every test and the tests of every line, by a run under coverage of each file of tests that is new or has changed: kept
        in ``build/reach.json``. The lines of a source that has changed since are not told apart: any of them stands for all."""
        path = self.folder / "build/reach.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        tests = [f for f in sorted((self.folder / "tests").glob("test_*.py")) if f.name not in UNTRACED]
        tests += [self.folder / "tests/triton_interpreted.py", self.folder / "tests/triton_memory.py"]
        for file in tests:
            if known.get(file.name, {}).get("digest") != digest(file):
                print(f"which lines {file.name} runs ...", flush=True)
                known[file.name] = self.trace(file)
                path.write_text(json.dumps({f.name: known[f.name] for f in tests if f.name in known}))
        seconds: dict[str, float] = {}
        lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in tests:
            seconds |= known[file.name]["seconds"]
            for source, (state, reached) in known[file.name]["lines"].items():
                same = (self.folder / source).exists() and digest(self.folder / source) == state
                for line, contexts in reached.items():
                    lines[source][int(line) if same else 0] |= set(contexts)
        return {"seconds": seconds, "lines": lines}

    def trace(self, file: Path) -> dict:
        import coverage

        build = self.folder / "build"
        settings, data = build / "coveragerc", build / "coverage"
        sources = "".join(f"    {self.folder}/{s}\n" for s in ("convit", "kernels", "bench"))
        settings.write_text(
            f"[run]\nparallel = true\ndata_file = {data}/one\ncontext = ${{PYTEST_CURRENT_TEST-}}\npatch = _exit\nsource =\n{sources}"
        )
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        environment = self.environment | {"COVERAGE_PROCESS_START": str(settings), "WORKSHOP_SECONDS": str(build / "seconds.json")}
        environment |= {"PYTHONPATH": str(self.folder / "tests")} | ({"TRITON_INTERPRET": "1"} if file.name.startswith("triton_") else {})
        command = [self.python, "-m", "pytest", "-q", "-p", "workshop", "-p", "no:cacheprovider", "-p", "no:randomly", str(file)]
        with (build / f"trace_{file.stem}.log").open("w") as log:
            subprocess.run(command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for piece in data.iterdir():
            read = coverage.CoverageData(str(piece))
            with contextlib.suppress(coverage.CoverageException):  # of a process that was killed
                read.read()
            for measured in read.measured_files():
                name = str(Path(measured).resolve().relative_to(self.folder))
                for line, contexts in read.contexts_by_lineno(measured).items():
                    lines[name][line] |= {re.sub(r" \((call|teardown)\)$", "", c) or f"tests/{file.name}" for c in contexts}
        shutil.rmtree(data)
        found = {name: [digest(self.folder / name), {line: sorted(t) for line, t in reached.items()}] for name, reached in lines.items()}
        return {"digest": digest(file), "seconds": json.loads((build / "seconds.json").read_text()), "lines": found}


# ---- as a plug-in of pytest, inside the copy


def _context(item: pytest.Item, when: str) -> None:
    if "coverage" in sys.modules:
        import coverage

        if running := coverage.Coverage.current():
            running.switch_context(f"{item.nodeid} ({when})")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _context(item, "setup")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _context(item, "call")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _context(item, "teardown")


_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _seconds[report.nodeid] = float("inf")  # fails as it is: it cannot judge


def pytest_sessionfinish() -> None:
    if path := os.environ.get("WORKSHOP_SECONDS"):
        Path(path).write_text(json.dumps(_seconds))


# ---- as a process inside the copy: what is slow to import is imported once, then every run of tests is a fork


class _Chosen:
    """These tests, in this order, and what failed."""

    def __init__(self, tests: list[str], running: Path) -> None:
        self.running = running
        self.place = {test: i for i, test in enumerate(tests)}
        self.failed: list[str] = []

    def where(self, item: pytest.Item) -> int | None:
        return self.place.get(item.nodeid, self.place.get(item.nodeid.split("::")[0]))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if self.where(item) is not None), key=lambda item: self.where(item) or 0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.write_text(nodeid)  # a crash leaves no other trace of its test

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _run(tests: list[str], stop: bool, out: Path) -> None:
    os.setsid()
    with (out / "tests.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    chosen = _Chosen(tests, out / "running")
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    status = pytest.main([*["-x"] * stop, "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files], plugins=[chosen])
    (out / "failed.json").write_text(json.dumps(chosen.failed))
    os._exit(int(status))


def serve() -> None:
    for name in (
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "hypothesis",
        "torch._dynamo",
        "torch.export",
        "matplotlib.pyplot",
        "onnx",
        "fastapi",
    ):
        with contextlib.suppress(ImportError):
            __import__(name)
    out = Path("build").resolve()
    for line in sys.stdin:
        asked = json.loads(line)
        (out / "failed.json").unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            if any(
                test.startswith("tests/triton_") for test in asked["tests"]
            ):  # they ask for a setting that Triton reads when it is imported
                os.environ["TRITON_INTERPRET"] = "1"
                os.execv(sys.executable, [sys.executable, "tests/workshop.py", line])
            _run(asked["tests"], asked["stop"], out)
        status: int | None = None
        waited, last = 0.0, time.monotonic()
        while waited < asked["seconds"]:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.05)
            now = time.monotonic()
            waited, last = waited + min(now - last, 1), now  # a machine that stood still is no slow test
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        if (out / "failed.json").exists():
            failed = json.loads((out / "failed.json").read_text())
        else:
            failed = [(out / "running").read_text()] if status is not None else []
        print(json.dumps({"status": status, "failed": failed[0] if failed else "", "all_failed": failed}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        again = json.loads(sys.argv[1])
        _run(again["tests"], again["stop"], Path("build").resolve())
    serve()
