"""Whole models as competitors at 224 x 224: ours, timm's ConViT and ViT, and timm's ConViT in other runtimes.

The problem says float32. "As it comes" is what a runtime, or ``convit.optimize``, makes of that by itself: bfloat16 products where the chip
has them; the note of each says which type it was. ONNX Runtime computes float32 on x86 as it comes.
"""

import atexit
import copy
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Call, Peer, backends, where
from torch import Tensor, nn

import convit
from convit.dispatch import Problem
from convit.weights.names import to_mindcv

IMAGE = 224


@dataclass(frozen=True)
class Model:
    """One whole-model problem: a ConViT variant, the batch, and where it runs."""

    name: str
    batch: int
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    train: bool = False  # a training step instead of inference; a narrow dtype is autocast's then, over float32 weights

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch} {self.dtype} {where(self.device, self.threads)}{' training' if self.train else ''}"


def images(model: Model, dtype: torch.dtype | None = None) -> Tensor:
    x = torch.randn(model.batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(224)).to(getattr(torch, model.dtype))
    return x.to(model.device, dtype or x.dtype)


@lru_cache(maxsize=2)
def _weights(name: str) -> dict[str, Tensor]:
    """Random weights of the variant, the same for every competitor."""
    torch.manual_seed(0)
    model = convit.create_model(name)
    for module in model.modules():
        if isinstance(module, convit.GPSA):
            nn.init.normal_(module.gating_param)  # gates of a trained model differ from head to head; fresh ones are all equal
    return model.state_dict()


def ours(model: Model) -> nn.Module:
    module = convit.create_model(model.name)
    module.load_state_dict(_weights(model.name))
    return module


def timm_convit(model: Model) -> nn.Module:
    import timm

    module = timm.create_model(model.name)
    module.load_state_dict(_weights(model.name))
    return module


def accelerated(model: Model) -> nn.Module:
    return convit.accelerate(timm_convit(model))


def without_gpsa(model: Model) -> nn.Module:
    """A plain ViT made of our layers: every block MHSA. What position costs shows against it, whatever the linear layers gain."""
    torch.manual_seed(0)
    return convit.create_model(model.name, local_up_to_layer=0)


def timm_vit(model: Model) -> nn.Module:
    """A plain ViT of the same width, heads and depth; its attention is the framework's fused one."""
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    like = convit.create_model(model.name)
    heads = like.blocks[0].attn.num_heads
    set_fused_attn(True)
    torch.manual_seed(0)
    return VisionTransformer(img_size=IMAGE, embed_dim=like.embed_dim, depth=len(like.blocks), num_heads=heads, qkv_bias=False)


@lru_cache(maxsize=8)
def _built(build: Callable[[Model], nn.Module], name: str, dtype: str, device: str, train: bool) -> nn.Module:
    """One module serves every batch and thread count; what inference caches cannot serve training."""
    return build(Model(name, 1, 1, dtype, device)).eval().to(device, getattr(torch, dtype))


def _module(build: Callable[[Model], nn.Module], model: Model) -> nn.Module:
    return _built(build, model.name, "float32" if model.train else model.dtype, model.device, model.train)


CHECKED = 2  # images of a batch whose logits are checked


def reference_outputs(model: Model, truth: str) -> tuple[Tensor, Tensor]:
    """Logits of the reference model for the first images, in float64 and in the problem's own dtype."""
    convits = timm_convit if find_spec("timm") else ours
    build = {"vit": timm_vit, "without GPSA": without_gpsa}.get(truth, convits)
    model = replace(model, device="cpu", train=False)
    module = _module(build, model)
    if truth == "mindcv":  # the same model with MindCV's GELU and LayerNorm
        module = copy.deepcopy(module)
        for part in module.modules():
            if isinstance(part, nn.GELU):
                part.approximate = "tanh"
            elif isinstance(part, nn.LayerNorm):
                part.eps = 1e-7
    with torch.inference_mode(), convit.use_backend("reference"):
        eager = module(images(model)[:CHECKED])
        exact = copy.deepcopy(module).double()(images(model, torch.float64)[:CHECKED])
    return exact, eager


def _torch_call(module: nn.Module, model: Model, backend: str | None = None) -> Call:
    x = images(model)
    if model.train:
        return _training_step(module, x.float(), model, backend)

    def call() -> tuple:
        with torch.inference_mode(), convit.use_backend(backend):
            return (module(x),)

    return call


def _training_step(module: nn.Module, x: Tensor, model: Model, backend: str | None) -> Call:
    """Forward, backward and AdamW.

    At a learning rate of zero the optimizer does all its work, and every step starts from the same weights.
    """
    cuda = model.device == "cuda"  # where a CUDA graph is made of the step
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0, fused=cuda, capturable=cuda)
    dtype = getattr(torch, model.dtype)

    def step() -> tuple:
        with convit.use_backend(backend):
            with torch.autocast(model.device, dtype, enabled=dtype != torch.float32):
                logits = module(x)
            optimizer.zero_grad()
            logits.float().square().mean().backward()
            optimizer.step()
        return (logits.detach(),)

    return step


def _onnx_file(model: Model) -> Path:
    # the graph does not depend on the thread count
    return _export(replace(model, threads=1, device="cpu"))


@cache
def _export(model: Model) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="convit-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{model.name}-{model.batch}.onnx"
    module = _module(timm_convit, model)
    x = images(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(x)  # fills timm's cache of relative indices, which bloats the graph otherwise
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    return path


def _onnxruntime(model: Model) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = model.threads, 1
    # its threads spin within a run as they like, but not on into the turn of the next competitor
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(_onnx_file(model)), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images(model).numpy()}
    return lambda: tuple(torch.from_numpy(y) for y in session.run(None, feed))


def _openvino(model: Model, hint: str | None = "f32") -> Call:
    """Held to a precision by ``hint``, or as it comes."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": model.threads}
    config |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    compiled = openvino.Core().compile_model(str(_onnx_file(model)), "CPU", config)
    request = compiled.create_infer_request()
    x = images(model).numpy()

    def call() -> tuple:
        return tuple(torch.from_numpy(y.copy()) for y in request.infer({0: x}).values())

    call.note = _openvino_type(compiled)
    return call


def _openvino_type(compiled: Any) -> str:
    return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[compiled.get_property("INFERENCE_PRECISION_HINT").to_string()]


@cache
def _openvino_chooses() -> str:
    """The type that OpenVINO computes in on this chip as it comes."""
    import openvino

    x = openvino.opset13.parameter([1, 8], dtype=openvino.Type.f32)
    return _openvino_type(openvino.Core().compile_model(openvino.Model([openvino.opset13.relu(x)], [x]), "CPU"))


def _optimized(model: Model, dtype: str | None) -> Call:
    snapshot = convit.optimize(_module(ours, model), dtype)
    call = _torch_call(snapshot, model)
    call.note = str(snapshot.dtype)[6:]
    return call


def _not_optimized(model: Model) -> str | None:
    return "inference on cpu only" if model.device != "cpu" or model.train else None


@cache
def _optimize_chooses() -> str:
    return str(convit.optimize(convit.ConViT(img_size=16, embed_dim=16, depth=1, num_heads=1, local_up_to_layer=0)).dtype)[6:]


class _MindCV:
    """A call that runs one inference in MindCV's own process; the message there and back costs some 0.1 ms."""

    def __init__(self, model: Model):
        self.folder = Path(tempfile.mkdtemp(prefix="convit-bench-"))
        weights = {key: value.numpy() for key, value in _weights(model.name).items()}
        np.savez(self.folder / "weights.npz", **to_mindcv(weights))
        np.save(self.folder / "images.npy", images(model).numpy())
        command = [_mindcv_python(), str(Path(__file__).with_name("mindcv_worker.py")), model.name, str(model.threads), str(self.folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # its warnings are read away as they come: a full pipe would stop it
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()
        weakref.finalize(self, _end, self.process, self.folder)
        self._expect("ready")
        self.logits = torch.from_numpy(np.load(self.folder / "logits.npy"))

    def _expect(self, word: str) -> None:
        if self.process.stdout.readline().strip() != word:
            self.process.wait()
            raise RuntimeError(f"MindCV's process ended with status {self.process.returncode}: {''.join(self.errors[-5:])}")

    def __call__(self) -> tuple:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        self._expect("done")
        return (self.logits,)


def _end(process: subprocess.Popen, folder: Path) -> None:
    process.kill()
    process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def _mindcv_python() -> str | None:
    """The Python of an environment with MindSpore and MindCV."""
    if find_spec("mindspore") and find_spec("mindcv"):
        return sys.executable
    return os.environ.get("CONVIT_BENCH_MINDCV")


def _mindcv_missing(model: Model) -> str | None:
    if model.device != "cpu" or model.train:
        return "measured for inference on cpu only"
    if _mindcv_python() is None:
        return "not installed here, and CONVIT_BENCH_MINDCV does not name the Python of an environment that has it and MindSpore"
    return None


def _needs(*modules: str, runtime: bool = False) -> Callable[[Model], str | None]:
    """What a competitor lacks: modules, and where it is another runtime what it cannot do or be held to."""

    def missing(model: Model) -> str | None:
        absent = [name for name in modules if find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        if runtime and (model.device != "cpu" or model.train):
            return "inference on cpu only"
        if runtime and (isa := os.environ.get("CONVIT_CPU_ISA")):
            return f"its matrix products cannot be held to {isa}"
        return None

    return missing


def _why_not(backend: str, model: Model) -> str | None:
    attention = _module(ours, model).blocks[0].attn
    side = IMAGE // 16
    shape = model.batch, attention.num_heads, side * side, attention.qk.in_features // attention.num_heads
    return convit.why_not(backend, Problem("torch", model.device, model.dtype, *shape, (side, side)))


def _ours(backend: str, first: bool) -> Peer:
    def build(model: Model) -> Call:
        return _torch_call(_module(ours, model), model, backend)

    def slow(model: Model) -> str | None:
        fallback = first or _why_not(backends(model.device)[0], model)
        return None if fallback and backend != "reference" else "a slower path; the attention core shows it"

    return Peer(f"convit {backend}", build, lambda model: _why_not(backend, model), ours=True, truth="convit", slow=slow)


def _optimized_peers() -> list[Peer]:
    def held(model: Model) -> Call:
        return _optimized(model, "float32")

    def as_it_comes(model: Model) -> Call:
        return _optimized(model, None)

    return [
        Peer("convit.optimize", held, _not_optimized, ours=True, truth="convit"),
        Peer("convit.optimize as it comes", as_it_comes, _not_optimized, True, "convit", computes=lambda model: _optimize_chooses()),
    ]


def model_peers(device: str) -> list[Peer]:
    """Every competitor for whole models on ``device``."""
    timm = _needs("timm")
    runtimes = ("timm", "onnx", "onnxscript")
    openvino = _needs(*runtimes, "openvino", runtime=True)

    def torch_peer(name: str, build: Callable[[Model], nn.Module], truth: str = "convit", is_ours: bool = False) -> Peer:
        return Peer(name, lambda model: _torch_call(_module(build, model), model), timm, is_ours, truth)

    def compiled(name: str, build: Callable[[Model], nn.Module], truth: str = "convit", is_ours: bool = False) -> Peer:
        return Peer(name, lambda model: _torch_call(torch.compile(_module(build, model)), model), timm, is_ours, truth, slow=compiles)

    def compiles(model: Model) -> str | None:
        return "compiles for a minute on CPU" if device == "cpu" else None

    return [
        *(_ours(name, first=name == backends(device)[0]) for name in backends(device)),
        *_optimized_peers(),
        torch_peer("convit.accelerate(timm)", accelerated, is_ours=True),
        torch_peer("timm convit eager", timm_convit),
        torch_peer("timm ViT with SDPA", timm_vit, truth="vit"),
        Peer("convit without GPSA", lambda model: _torch_call(_module(without_gpsa, model), model), truth="without GPSA"),
        compiled("torch.compile(convit)", ours, is_ours=True),
        compiled("torch.compile(timm)", timm_convit),
        compiled("torch.compile(ViT)", timm_vit, truth="vit"),
        Peer("ONNX Runtime", _onnxruntime, _needs(*runtimes, "onnxruntime", runtime=True), truth="convit"),
        Peer("OpenVINO", _openvino, openvino, truth="convit"),
        Peer(
            "OpenVINO as it comes",
            lambda model: _openvino(model, None),
            openvino,
            truth="convit",
            computes=lambda model: _openvino_chooses(),
        ),
        Peer("MindCV, graph mode", _MindCV, _mindcv_missing, truth="mindcv", slow=compiles),
    ]
