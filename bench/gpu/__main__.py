"""The stages of ``bench/gpu.sh``: ``python bench/gpu STAGE --out DIR --limit SECONDS [--rehearse]``.

    environment  device, driver, versions, clocks
    correctness  values, gradients, determinism, poisoned memory, CUDA graphs, torch.compile
    roofline     the rate of matrix products and the bandwidth of a copy
    sanitizer    compute-sanitizer: memcheck, initcheck, racecheck, synccheck
    profile      each kernel of a call, predicted and measured -> kernels.md; Nsight Compute where it is installed -> ncu.txt
    sweep        configurations of every kernel, and content by the loops or by SDPA; rows for the tables in
                 kernels/gpsa/gpu_triton/configs.py -> configs.txt
    core         the attention core against its peers, with the rows just found; device by CUDA graphs, host beside it
    models       whole models, inference and training steps, in the same way
    plots        PNG
    summary      at most 40 lines -> summary.txt
    plan, next, record, forget   what is left to do; the next stage; how one ended; to do some again
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
import predicted  # noqa: E402
import summary  # noqa: E402
import sweep  # noqa: E402
from stage import MORE, STAGES, Stage, following, interpret, one_call, plan  # noqa: E402

WORK = {"environment": measure.environment, "correctness": correctness.correctness, "roofline": measure.roofline, "sweep": sweep.sweep}
WORK |= {"sanitizer": correctness.sanitizer, "profile": predicted.profile}
WORK |= {"core": measure.core, "models": measure.models, "plots": summary.plots}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "plan", "next", "record", "forget", "summary", "call", "tiny-call"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu-run"))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that the stage may take")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--ended", help="with 'record': STAGE:STATUS:SECONDS")
    parser.add_argument("--seconds", type=int, default=560, help="with 'plan' and 'next': of a call, or what is left of it")
    parser.add_argument("--stages", default="", help="with 'next': no others than these; with 'forget': these")
    parser.add_argument("--tried", default="", help="with 'next': what this call has done")
    args = parser.parse_args(argv)
    if args.stage == "summary":
        return summary.summary(args.out)
    if args.stage.endswith("call"):
        one_call(args.stage == "tiny-call")
        return 0
    stage = Stage(args.stage, args.out, args.limit, args.rehearse)
    ended = stage.load().get("stages", {})
    if args.stage == "plan":
        print("\n".join(plan(ended, args.seconds)))
    elif args.stage == "next":
        print(*(following(ended, args.seconds, args.stages, args.tried) or ()))
    elif args.stage == "forget":
        stage.forget(args.stages.split(","))
    elif args.stage == "record":
        name, status, seconds = args.ended.split(":")
        stage.save("stages", **{name: {"status": int(status), "seconds": int(seconds)}})
    else:
        return work(stage)
    return 0


def work(stage: Stage) -> int:
    """Run the stage; its exit status."""
    print(f"==== {stage.name}", flush=True)
    try:
        stage.begin()
        if stage.name in os.environ.get("CONVIT_GPU_FAIL", "").split(","):
            raise RuntimeError("CONVIT_GPU_FAIL names this stage")
        if stage.rehearse:
            interpret()
        more = WORK[stage.name](stage)
    except Exception as error:
        traceback.print_exc()
        stage.save(error=f"{type(error).__name__}: {error}")
        return 1
    return MORE if more else 0


if __name__ == "__main__":
    sys.exit(main())
