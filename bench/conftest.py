"""Options of the benchmark, the group that is timed as one, and what is recorded beside the times."""

import os
import platform
import sys

import pytest

ISA_VARIABLES = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "CONVIT_CPU_ISA": "avx2"},
}


def pytest_addoption(parser) -> None:
    group = parser.getgroup("ConViT benchmark")
    group.addoption("--bench-full", action="store_true", help="every peer and size; takes an hour on a small machine")
    group.addoption("--bench-threads", default="", help="CPU thread counts, such as 1,2 (default: 1 and all; --bench-full: between too)")
    group.addoption("--bench-isa", choices=list(ISA_VARIABLES), help="hold every CPU library to this instruction set")
    group.addoption("--bench-device", help="torch device type (default: cuda if there is one, else cpu)")
    group.addoption("--bench-budget", type=float, help="seconds of timing per group (default: 2, with --bench-full 20)")
    group.addoption("--bench-rounds", type=int, help="most rounds per group (default: 15, with --bench-full 50)")


def pytest_configure(config) -> None:
    isa = config.getoption("--bench-isa")
    if isa:
        if "torch" in sys.modules:
            raise pytest.UsageError("--bench-isa must be set before torch is imported, and a plugin has imported it already")
        os.environ.update(ISA_VARIABLES[isa])
    # after the environment is set: torch and its libraries read it once, as they load
    from session import Session

    config.bench = Session(
        device=config.getoption("--bench-device"),
        full=config.getoption("--bench-full"),
        threads=config.getoption("--bench-threads"),
        budget=config.getoption("--bench-budget"),
        rounds=config.getoption("--bench-rounds"),
        isa=isa,
    )


@pytest.fixture
def bench(request, benchmark):
    """Time the test's whole group once, and give the test its own peer's share: ``bench(problem, peer, **extra)``."""

    session = request.config.bench

    def run(problem, peer, **options) -> None:
        benchmark.group = str(problem)
        # the group is what was selected of it: -k narrows the competition, not the samples of one peer
        chosen = [item.callspec.params["peer"] for item in request.session.items if _problem(item) == problem]
        competitor = session.group(problem, chosen, **options)[peer.name]
        if competitor.missing:
            benchmark.skipped = True
            pytest.skip(f"{peer.name}: {competitor.missing}")
        if competitor.error:
            benchmark.skipped = True  # it has nothing to time, and the failure says so
            raise competitor.error
        benchmark.extra_info.update(competitor.info)
        session.replay(benchmark, competitor)

    run.session = session
    return run


def _problem(item):
    return getattr(item, "callspec", None) and item.callspec.params.get("problem")


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    cpu = machine_info["cpu"]
    kept = {key: machine_info[key] for key in ("machine", "python_version", "system")}
    machine_info.clear()
    machine_info.update(kept, cpu=cpu.get("brand_raw", platform.processor()))


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    output_json["convit"] = config.bench.record()
    for entry in output_json["benchmarks"]:
        entry["params"] = None  # objects of the harness; what they say is in extra_info
        entry["stats"]["data"] = [float(f"{seconds:.6g}") for seconds in entry["stats"]["data"]]


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not config.bench.groups:
        return
    import results
    import tables

    terminalreporter.section("ConViT benchmark: times over ours, medians of interleaved rounds")
    for line in tables.summary(results.Run.from_session(config.bench)).splitlines():
        terminalreporter.write_line(line)
