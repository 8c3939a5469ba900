"""Whole models as competitors: ours, timm's ConViT and ViT, and timm's ConViT in other runtimes. float32 inference at 224 x 224."""

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from peers import Call, Peer, backends, where
from torch import Tensor, nn

import convit
from convit.backends import Problem

IMAGE = 224


@dataclass(frozen=True)
class Model:
    """One whole-model problem: a ConViT variant, the batch, and where it runs."""

    name: str
    batch: int
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch} {self.dtype} {where(self.device, self.threads)}"


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


def _place(module: nn.Module, model: Model) -> nn.Module:
    return module.eval().to(model.device, getattr(torch, model.dtype))


def ours(model: Model) -> nn.Module:
    module = convit.create_model(model.name)
    module.load_state_dict(_weights(model.name))
    return _place(module, model)


def timm_convit(model: Model) -> nn.Module:
    import timm

    module = timm.create_model(model.name)
    module.load_state_dict(_weights(model.name))
    return _place(module, model)


def timm_vit(model: Model) -> nn.Module:
    """A plain ViT of the same width, heads and depth; its attention is the framework's fused one."""
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    like = convit.create_model(model.name)
    heads = like.blocks[0].attn.num_heads
    set_fused_attn(True)
    torch.manual_seed(0)
    module = VisionTransformer(img_size=IMAGE, embed_dim=like.embed_dim, depth=len(like.blocks), num_heads=heads, qkv_bias=False)
    return _place(module, model)


REFERENCES: dict[str, Callable[[Model], nn.Module]] = {
    "convit": lambda model: timm_convit(model) if find_spec("timm") else ours(model),
    "vit": timm_vit,
}


def reference_outputs(model: Model, truth: str) -> tuple[Tensor, Tensor]:
    """Logits of the reference model in float64 and in the problem's own dtype."""
    module = REFERENCES[truth](replace(model, device="cpu"))
    with torch.inference_mode(), convit.use_backend("reference"):
        eager = module(images(replace(model, device="cpu")))
        exact = module.double()(images(replace(model, device="cpu"), torch.float64))
    return exact, eager


def _torch_call(module: nn.Module, model: Model, backend: str | None = None) -> Call:
    x = images(model)

    def call() -> tuple:
        with torch.inference_mode(), convit.use_backend(backend):
            return (module(x),)

    return call


def _onnx_file(model: Model) -> Path:
    # the graph does not depend on the thread count
    return _export(replace(model, threads=1, device="cpu"))


@cache
def _export(model: Model) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="convit-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{model.name}-{model.batch}.onnx"
    module = timm_convit(model)
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


def _openvino(model: Model) -> Call:
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": model.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(_onnx_file(model)), "CPU", config).create_infer_request()
    x = images(model).numpy()
    return lambda: tuple(torch.from_numpy(y.copy()) for y in request.infer({0: x}).values())


def _needs(*modules: str, device: str | None = None) -> Callable[[Model], str | None]:
    def missing(model: Model) -> str | None:
        absent = [name for name in modules if find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        if device and model.device != device:
            return f"runs on {device} only"
        return None

    return missing


def _ours(backend: str, slow: str | None = None) -> Peer:
    def missing(model: Model) -> str | None:
        attention = convit.create_model(model.name).blocks[0].attn
        side = IMAGE // 16
        shape = model.batch, attention.num_heads, side * side, attention.qk.in_features // attention.num_heads
        return convit.why_not(backend, Problem("torch", model.device, model.dtype, *shape, (side, side)))

    def build(model: Model) -> Call:
        return _torch_call(ours(model), model, backend)

    return Peer(f"convit {backend}", build, missing, ours=True, truth="convit", slow=lambda model: slow)


def _accelerated(model: Model) -> Call:
    return _torch_call(convit.accelerate(timm_convit(model)), model)


def model_peers(device: str) -> list[Peer]:
    """Every competitor for whole models on ``device``."""
    timm = _needs("timm")
    fused = [name for name in backends(device) if name != "reference"]
    runtimes = ("timm", "onnx", "onnxscript")

    def compiles(model: Model) -> str | None:
        return "compiles for a minute on CPU" if device == "cpu" else None

    return [
        *(_ours(name) for name in fused),
        _ours("reference", slow="the definition is slow; the attention core shows it"),
        Peer("convit.accelerate(timm)", _accelerated, timm, ours=True, truth="convit"),
        Peer("timm convit eager", lambda model: _torch_call(timm_convit(model), model), timm, truth="convit"),
        Peer("timm ViT with SDPA", lambda model: _torch_call(timm_vit(model), model), timm, truth="vit"),
        Peer("torch.compile(timm)", lambda m: _torch_call(torch.compile(timm_convit(m)), m), timm, truth="convit", slow=compiles),
        Peer("ONNX Runtime", _onnxruntime, _needs(*runtimes, "onnxruntime", device="cpu"), truth="convit"),
        Peer("OpenVINO", _openvino, _needs(*runtimes, "openvino", device="cpu"), truth="convit"),
    ]
