"""``make ascend-check``: what can be shown of the Ascend kernels without an Ascend machine, rung by rung, as one table.

    python tests/ascend/check.py [--envs DIR] [--only RUNG,...] [--markdown FILE]

Each rung is a script run in a virtual environment that this one makes (under build/ascend unless --envs says otherwise): MindSpore 2.10
and 2.7.0 to compile and run on CPU, the latter also for its AKG library that emits Ascend code; triton-ascend; ascendnpu-ir. None touches
an NPU: the last column says what stays unproven. Exit status: 0 if every rung holds, 1 otherwise.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

ENVIRONMENTS = {
    "mindspore": [["mindspore>=2.10,<2.11", "numpy<2", "decorator", "PyYAML", "safetensors", "pytest"]],
    "mindspore-2.7": [["mindspore==2.7.0", "numpy<2", "decorator", "PyYAML", "safetensors", "pytest"]],
    "triton-ascend": [["numpy", "pybind11"], ["--no-deps", "triton-ascend==3.2.0"]],
    "ascendnpu-ir": [["--no-deps", "ascendnpu-ir==1.2.0"]],
}

# rung -> environment, script (or -m) and arguments, seconds after which it is stopped and counts as failed; the longest first
FLASH = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(ROOT / "tests/with_mindspore/test_ascend.py")]
RUNGS = {
    "linalg": ("triton-ascend", ["on_triton.py", "linalg"], 600),
    "hivm": ("triton-ascend", ["on_triton.py", "hivm"], 600),
    "flash": ("mindspore", FLASH, 500),
    "flash-2.7": ("mindspore-2.7", FLASH, 500),
    "plain": ("mindspore", ["on_mindspore.py", "plain"], 200),
    "graph": ("mindspore", ["on_mindspore.py", "graph"], 400),
    "pynative": ("mindspore", ["on_mindspore.py", "pynative"], 400),
    "refusals": ("mindspore", ["on_mindspore.py", "refusals"], 200),
    "model": ("mindspore", ["on_mindspore.py", "model"], 500),
    "cce": ("mindspore-2.7", ["lower.py", "cce"], 500),
    "tbe": ("mindspore-2.7", ["lower.py", "tbe"], 500),
    "cuda": ("mindspore-2.7", ["lower.py", "cuda"], 300),
}


def environment(name: str, folder: Path) -> Path:
    """The Python of environment ``name``, made if it is not there or if its requirements changed."""
    home = folder / name
    stamp = home / "ready.json"
    wanted = json.dumps(ENVIRONMENTS[name])
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        for requirements in ENVIRONMENTS[name]:
            subprocess.run([str(home / "bin/pip"), "install", "-q", *requirements], check=True)
        packages = next(home.glob("lib/python3*/site-packages"))
        (packages / "convit.pth").write_text(f"{folder / 'tree'}\n")
        stamp.write_text(wanted)
    return home / "bin/python"


def link(folder: Path) -> None:
    """``convit`` of this tree for every environment, and nothing else of its root."""
    package = folder / "tree/convit"
    shutil.rmtree(package.parent, ignore_errors=True)
    package.parent.mkdir(parents=True)
    package.symlink_to(ROOT / "convit")


def run(rung: str, folder: Path) -> tuple[list[dict], str | None]:
    """The rows that a rung printed, and why it failed (None if it did not)."""
    name, (script, *arguments), seconds = RUNGS[rung]
    python = folder / name / "bin/python"
    work = folder / "work" / rung
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [str(python), script if script == "-m" else str(HERE / script), *arguments]
    settings = os.environ | {"ASCEND_CHECK_ENVS": str(folder), "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    with open(work / "log", "w") as log:
        process = subprocess.Popen(command, cwd=work, env=settings, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return [], f"stopped after {seconds} s; log: {work}/log"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    if process.returncode:
        last = [line for line in (work / "log").read_text().splitlines() if line.strip()][-1:]
        return rows, f"exit status {process.returncode}: {' '.join(last)[:300]}; log: {work}/log"
    return rows, None if rows else "the rung printed no row"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=Path, default=ROOT / "build/ascend", help="where the environments are kept")
    parser.add_argument("--only", default="", help="comma-separated rungs: " + ", ".join(RUNGS))
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(RUNGS)
    unknown = set(chosen) - set(RUNGS)
    if unknown:
        parser.error(f"unknown rung {', '.join(sorted(unknown))}; known: {', '.join(RUNGS)}")
    folder = options.envs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    link(folder)
    # lower.py has the operators described by MindSpore 2.10, hivm is the other compiler's
    names = {RUNGS[rung][0] for rung in chosen} | ({"mindspore"} if {"cce", "cuda"} & set(chosen) else set())
    names |= {"ascendnpu-ir"} if "hivm" in chosen else set()
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: environment(name, folder), sorted(names)))
    print(f"environments: {', '.join(sorted(names))} ({time.monotonic() - start:.0f} s)", flush=True)

    def timed(rung: str) -> tuple[str, list[dict], str | None]:
        start = time.monotonic()
        rows, failure = run(rung, folder)
        print(f"{rung}: {'FAILED, ' + failure if failure else 'ok'} ({time.monotonic() - start:.0f} s)", flush=True)
        return rung, rows, failure

    table = ["| op | rung | result | not proven |", "|---|---|---|---|"]
    failures = 0
    with ThreadPoolExecutor(2) as pool:
        for rung, rows, failure in pool.map(timed, chosen):
            failures += failure is not None
            table += [f"| {row['op']} | {row['rung']} | {row['result']} | {row['unproven']} |" for row in rows]
            if failure:
                table.append(f"| | {rung} | FAILED: {failure} | |")
    print("\n" + "\n".join(table) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join(table) + "\n")
    print(f"{len(chosen) - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
