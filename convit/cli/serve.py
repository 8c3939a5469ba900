"""``convit serve CHECKPOINT``: an HTTP service with a page."""

import argparse
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  convit serve RUN                                             the best model of a training run, on http://127.0.0.1:8000
  convit serve weights.safetensors --host 0.0.0.0 --port 80    any checkpoint, for other machines"""
    parser.add_argument("model", metavar="CHECKPOINT", help="a run folder, any checkpoint, or a variant (its published weights)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one of this machine's [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one [8000]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of convit.optimize, on CPU; auto: bfloat16 where the chip multiplies it [auto]",
    )
    parser.add_argument("--threads", type=int, help="threads of the model on CPU [torch's own choice]")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="images per forward pass [16]")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="images in the service at a time; more get 503 [64]")
    parser.add_argument("--max-upload", type=float, default=10, metavar="MB", help="largest request [10]")
    parser.add_argument("--max-pixels", type=float, default=50, metavar="M", help="largest image, millions of pixels [50]")
    parser.add_argument(
        "--timeout", type=float, default=30, metavar="S", help="seconds that an upload, or the end of the service, may take [30]"
    )


def run(args: argparse.Namespace) -> None:
    try:
        import multipart  # noqa: F401
        import uvicorn

        from convit.serve import create_app
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs {error.name}: pip install '.[serve]' in the source folder") from error
    import torch

    from convit.engine.pytorch.distributed import choose_device
    from convit.engine.pytorch.trained import trained_model
    from convit.engine.world import World

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    model = trained_model(args.model if not Path(args.model).exists() else Path(args.model)).to(choose_device(args.device, World()))
    app = create_app(
        model,
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        max_upload=int(args.max_upload * 1e6),
        max_pixels=int(args.max_pixels * 1e6),
        timeout=args.timeout,
        precision=args.precision,
    )

    def end_now(signum: int, frame: FrameType | None) -> None:
        os._exit(128 + signum)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:  # a second signal
                print("convit serve: stopped at once, requests in flight are not answered", file=sys.stderr, flush=True)
                end_now(sig, frame)
            super().handle_exit(sig, frame)

    # requests in flight are answered after SIGTERM and SIGINT, new ones are not taken
    graceful = max(1, round(args.timeout))
    server = Server(uvicorn.Config(app, host=args.host, port=args.port, timeout_graceful_shutdown=graceful, access_log=False))
    signal.signal(signal.SIGINT, end_now)  # while the server starts, and after it
    with suppress(KeyboardInterrupt, SystemExit):  # uvicorn's own exit says no more than what it has printed
        server.run()
    if not server.started:
        raise OSError(f"{args.host}:{args.port} cannot be served, as the lines above say")
