"""The stages of ``bench/gpu.sh``: ``python bench/gpu STAGE --out DIR --limit SECONDS [--rehearse]``.

    environment  device, driver, versions, clocks
    correctness  values, gradients, determinism, poisoned memory, CUDA graphs, torch.compile, compute-sanitizer
    roofline     the rate of matrix products and the bandwidth of a copy
    sweep        configurations of every kernel; rows for the table in kernels/gpsa/gpu_triton/configs.py -> configs.txt
    core         the attention core against its peers, with the rows just found
    models       whole models, inference and training steps
    profile      device time of each kernel of one call; Nsight Compute where it is installed -> profile.txt
    plots        PNG
    summary      at most 40 lines -> summary.txt
    call         one forward and backward pass, for the tools that watch a process; tiny-call: of small tensors

Each keeps its result as it goes in DIR/run.json. With --rehearse all of it runs on the CPU in Triton's interpreter. The variable
CONVIT_GPU_FAIL names stages that shall fail, for the test that nothing else goes with them.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "tests")]

import correctness  # noqa: E402
import measure  # noqa: E402
import summary  # noqa: E402
import sweep  # noqa: E402
from stage import STAGES, Stage, one_call  # noqa: E402

WORK = {"environment": measure.environment, "correctness": correctness.correctness, "roofline": measure.roofline, "sweep": sweep.sweep}
WORK |= {"core": measure.core, "models": measure.models, "profile": measure.profile, "plots": summary.plots}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "record", "summary", "call", "tiny-call"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu-run"))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that the stage may take")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--ended", help="with 'record': STAGE:STATUS:SECONDS")
    args = parser.parse_args(argv)
    if args.stage == "summary":
        return summary.summary(args.out)
    if args.stage.endswith("call"):
        one_call(args.stage == "tiny-call")
        return 0
    stage = Stage(args.stage, args.out, args.limit, args.rehearse)
    if args.stage == "record":
        name, status, seconds = args.ended.split(":")
        stage.save("stages", **{name: {"status": int(status), "seconds": int(seconds)}})
        return 0
    print(f"==== {args.stage}", flush=True)
    try:
        stage.reset()
        if args.stage in os.environ.get("CONVIT_GPU_FAIL", "").split(","):
            raise RuntimeError("CONVIT_GPU_FAIL names this stage")
        if args.rehearse:
            os.environ["TRITON_INTERPRET"] = "1"
        WORK[args.stage](stage)
    except Exception as error:
        traceback.print_exc()
        stage.save(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
