"""``convit.optimize``: an inference-only snapshot of a ConViT for CPU, its weights packed once.

The snapshot shares nothing with the model and never follows it, so that what is packed is never stale. Only a model that is known to
the last module is taken: ours, timm's or FAIR's, also accelerated, with nothing subclassed, hooked, replaced, parametrised or
quantised. What is read is then held against the model itself on one image, so that a difference nobody thought of is refused too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convit.dispatch import forced_backend
from convit.kernels.eager import eager, unhooked
from convit.kernels.linear import cpu_infer, cpu_packed
from convit.pytorch.model import ConViT
from convit.pytorch.network import Network, Plain, Shape, forward

_TYPES = (torch.float32, torch.bfloat16)
_EAGER = (
    "a snapshot of convit.optimize runs plain tensors, eagerly: trace, script, export or transform the model that it was made from, "
    "or take the exports of `convit export`"
)
_WAY_OUT = "run the model itself, or convit.accelerate(model), which leaves alone what it does not know"


def optimize(model: nn.Module, dtype: torch.dtype | str | None = None) -> "Optimized":
    """An inference-only copy of a ConViT for CPU, faster than the model: packed weights, fused operators, bfloat16 where the chip has it.

    Args:
        model: Our, timm's or FAIR's ConViT, also after ``convit.accelerate``; in any mode, on any device. It stays as it is.
        dtype: Of the products and the attention, ``torch.float32`` or ``torch.bfloat16``; norms, residuals and logits are float32 always.
            Default: bfloat16 where the chip multiplies it natively, else float32. ``repr`` of the result says which.

    Returns:
        A module that takes images and returns logits, as the model does in evaluation mode.

    Raises:
        TypeError: ``model`` is no module, or the dtype is another one.
        ValueError: The model is not exactly one of those: which part is not, and what to do instead, are said.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Optimized):
        raise ValueError("the model is already a snapshot of convit.optimize: optimize the model that it was made from")
    dtype = _dtype(dtype)
    shape = _read(model)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    with torch.device("cpu"):  # whatever the default device is
        _compare(model, shape, tensors)
    return Optimized(shape, tensors, dtype, getattr(model, "pretrained_cfg", None))


class Optimized(nn.Module):
    """What ``convit.optimize`` returns. It has no parameters, cannot be trained, moved or changed, and may be called from several threads.

    ``state_dict`` gives the weights back under the model's names, float32, rounded as they are used; so it pickles and copies.
    """

    def __init__(self, shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype, pretrained_cfg: Any = None):
        super().__init__()
        self.training = False
        self.dtype = dtype
        self.pretrained_cfg = pretrained_cfg
        self.num_classes, self.in_chans = shape.classes, shape.channels
        own = cpu_infer.why_not(dtype) is None and forced_backend(None) in (None, "cpp")
        with torch.device("cpu"):
            self._network = _pack(shape, tensors, dtype, cpu_infer.Product if own else cpu_packed.Packed)
            self._inference = cpu_infer.Inference(self._network, dtype) if own else None

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes], float32."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a floating-point tensor, got {type(images).__name__}")
        if not images.is_floating_point() or images.layout != torch.strided:
            raise TypeError(f"images must be a dense floating-point tensor, got {images.dtype}, {images.layout}")
        if images.device.type != "cpu":
            raise ValueError(f"this snapshot computes on the CPU, the images are on {images.device}")
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a snapshot of convit.optimize has no gradient: differentiate the model that it was made from")
        images = images.resolve_neg()
        if not eager(images):
            raise RuntimeError(_EAGER)
        if images.numel() and images.untyped_storage().nbytes() == 0:
            raise ValueError("the storage of images has been freed")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if self._inference is not None:
                return self._inference(self._network, images)
            return forward(self._network, images, self.dtype)

    def __prepare_scriptable__(self) -> "Optimized":
        raise RuntimeError(_EAGER)

    def train(self, mode: bool = True) -> "Optimized":
        """Evaluation mode is the only one."""
        if mode:
            raise RuntimeError("a snapshot of convit.optimize cannot be trained: train the model, then optimize it again")
        return self

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, destination: Any = None) -> dict[str, Any]:  # type: ignore[override]
        """The plain weights, float32, under the names of the model."""
        found = {} if destination is None else destination
        found.update((prefix + name, tensor) for name, tensor in _unpack(self._network))
        return found

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a snapshot of convit.optimize cannot take other weights: load them into the model, then optimize it again")

    def extra_repr(self) -> str:
        shape = self._network.shape
        size, products = "any" if shape.dynamic else shape.image, "PyTorch" if self._inference is None else "own"
        return f"{str(self.dtype)[6:]}, dim={shape.dim}, depth={shape.depth}, img_size={size}, products={products}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Optimized":
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype not in (torch.float32, self.dtype):
            raise RuntimeError(
                "a snapshot of convit.optimize cannot be moved or cast: optimize the model with the dtype wanted, for the CPU"
            )
        return self

    def __reduce__(self) -> Any:
        return Optimized, (self._network.shape, self.state_dict(), self.dtype, self.pretrained_cfg)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if _multiplies_bfloat16() else torch.float32
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in _TYPES:
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    return dtype


def _multiplies_bfloat16() -> bool:
    asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asks)


# ---- weights in and out ---------------------------------------------------------------------------------------------------------


def _pack(shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype, product: Callable[..., Any]) -> Network:
    rows = shape.grid[0] * shape.grid[1]
    products: dict[str, Any] = {}
    packed: set[str] = set()
    for key, layers in shape.products():
        weights = [tensors[f"{layer}.weight"].flatten(1).to("cpu", torch.float32) for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [tensors[f"{layer}.bias"].to("cpu", torch.float32) for layer in layers if f"{layer}.bias" in tensors]
        products[key] = product(weight, torch.cat(biases) if biases else None, dtype, rows if key != "head" else 1)
        packed.update(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))
    others = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in tensors.items() if name not in packed}
    return Network(shape, products, others)


def _unpack(net: Network) -> Iterator[tuple[str, Tensor]]:
    shape = net.shape
    yield from ((name, tensor.clone()) for name, tensor in net.tensors.items())
    for key, layers in shape.products():
        packed = net.products[key]
        parts = {1: [1.0], 2: [2 / 3, 1 / 3]}[len(layers)]  # q and k, then v
        weight = packed.unpack().float()
        sizes = [round(part * weight.shape[0]) for part in parts]
        biases = [None] * len(layers) if packed.bias is None else packed.bias.float().split(sizes)
        for layer, w, b in zip(layers, weight.split(sizes), biases, strict=True):
            if key == "patch":
                w = w.unflatten(1, (shape.channels, *shape.patch))
            yield f"{layer}.weight", w.clone()
            if b is not None:
                yield f"{layer}.bias", b.clone()


# ---- what is known --------------------------------------------------------------------------------------------------------------


def _unknown(what: str) -> ValueError:
    return ValueError(f"convit.optimize takes ConViTs of ConViT, timm and FAIR as they are, and {what}: {_WAY_OUT}")


_PARTS = {
    "patch_embed": "PatchEmbed",
    "patch_embed.proj": "Conv2d",
    "patch_embed.norm": "Identity",
    "pos_drop": "Dropout",
    "blocks": "ModuleList",
    "blocks.*": "Block",
    "blocks.*.norm1": "LayerNorm",
    "blocks.*.norm2": "LayerNorm",
    "blocks.*.attn": "GPSA MHSA",
    "blocks.*.attn.attn_drop": "Dropout",
    "blocks.*.attn.proj_drop": "Dropout",
    **{f"blocks.*.attn.{name}": "Linear" for name in ("qk", "v", "qkv", "proj", "pos_proj")},
    "blocks.*.drop_path": "DropPath Identity",
    "blocks.*.mlp": "Mlp _NoNormMlp _OneDropMlp",
    "blocks.*.mlp.act": "GELU",
    "blocks.*.mlp.norm": "Identity",
    **{f"blocks.*.mlp.{name}": "Dropout" for name in ("drop", "drop1", "drop2")},
    "blocks.*.mlp.fc1": "Linear",
    "blocks.*.mlp.fc2": "Linear",
    "norm": "LayerNorm",
    "head_drop": "Dropout",
    "head": "Linear Identity",
}
_FRAMEWORK = {"Conv2d", "Dropout", "ModuleList", "Linear", "Identity"}  # torch's own or nothing


def _read(model: Any) -> Shape:
    """The shape of a model of which every module is known; the error of the module's docstring if one is not."""
    home = type(model).__module__
    names = {"ConViT": "convit.pytorch.model", "ConVit": "timm.models.convit", "VisionTransformer": home}
    if names.get(type(model).__name__) != home or not hasattr(model, "local_up_to_layer"):
        raise _unknown(f"this is a {type(model).__name__} of {home}")
    for path, module in model.named_modules():
        _check(path, module, home)
    parameters = dict(model.named_parameters())
    for name, x in [*parameters.items(), *model.named_buffers()]:
        if type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point():
            raise _unknown(f"{name} is a {type(x).__name__} of {x.dtype}, as quantisation leaves it")
        if x.device.type == "meta":
            raise _unknown(f"{name} is on the meta device, without values")
        if not x.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values, so that no output can be checked: load sound weights, then optimize")
    blocks, embed, depth = list(model.blocks), model.patch_embed, len(model.blocks)
    local = sum("gating_param" in dict(block.attn.named_parameters()) for block in blocks)
    if local != model.local_up_to_layer or not all(hasattr(block.attn, "gating_param") for block in blocks[:local]):
        raise _unknown(f"local_up_to_layer is {model.local_up_to_layer} where {local} blocks are GPSA")
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)] + [model.norm]
    pool = getattr(model, "global_pool", "token") if hasattr(model, "head_drop") else "token"
    shape = Shape(
        image=_pair(embed.img_size),
        patch=_pair(embed.proj.kernel_size),
        channels=embed.proj.in_channels,
        dim=embed.proj.out_channels,
        classes=model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        local=local,
        prefix=model.cls_token.shape[1] + (model.reg_token.shape[1] if "reg_token" in parameters else 0),
        pool=pool,
        dynamic=bool(getattr(embed, "dynamic", False)),
        heads=tuple(int(block.attn.num_heads) for block in blocks),
        scales=tuple(float(block.attn.scale) for block in blocks),
        hidden=tuple(block.mlp.fc1.out_features for block in blocks),
        gelus=tuple(block.mlp.act.approximate for block in blocks),
        eps=tuple(norm.eps for norm in norms),
    )
    ours = type(model) is ConViT
    if getattr(embed, "pad", False):
        raise _unknown("it pads images (dynamic_img_pad), which a snapshot does not")
    if not ours and local == depth:
        raise _unknown("without an MHSA block its class token never joins, a fault of timm's and FAIR's that ours does not repeat")
    bare = [block.attn for block in blocks[:local] if type(block.attn).__module__ != "convit.pytorch.gpsa"]
    if bare and shape.grid[0] != shape.grid[1]:
        raise ValueError(f"this GPSA takes its {shape.grid[0]} x {shape.grid[1]} grid for a square: convit.accelerate(model, grid='image')")
    for attn in (block.attn for block in blocks[:local] if block.attn not in bare):
        if not ours and (laid := attn._grid(shape.grid[0] * shape.grid[1], None)) != shape.grid:
            raise _unknown(
                f"a GPSA lays the patches on {laid}, not on the image's {shape.grid}: convit.accelerate(model, grid='image'), or"
            )
    return shape


def _check(path: str, module: nn.Module, home: str) -> None:
    kind, source = type(module).__name__, type(module).__module__
    if path:
        role = ".".join("*" if part.isdigit() else part for part in path.split("."))
        allowed = _PARTS.get(role, "").split()
        torchs = kind in _FRAMEWORK or kind in ("LayerNorm", "GELU")
        known = source.startswith("torch.nn.modules.") if torchs else source == home or source.startswith(("convit.pytorch.", "timm."))
        if kind == "LayerNorm" and source.startswith("timm.layers."):
            known = True  # torch's, with a faster path of its own
        if kind not in allowed or not known:
            raise _unknown(f"{path} is a {kind} of {source}")
    if not unhooked(module):
        raise _unknown(f"{path or 'the model'} has hooks or a forward of its own: remove them, or")
    replaced = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if replaced:
        raise _unknown(f"{path or 'the model'} has {', '.join(replaced)} replaced")
    if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None or len(module.normalized_shape) != 1):
        raise _unknown(f"{path} has no weight, no bias or several axes")
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == module.stride and module.groups == 1 and set(module.dilation) == {1} and set(module.padding) == {0}
        if not plain:
            raise _unknown(f"{path} is no plain patch embedding")


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@torch.no_grad()
def _compare(model: nn.Module, shape: Shape, tensors: dict[str, Tensor]) -> None:
    """Refuse a model whose own output on one image is not that of what was read from it."""
    weight = tensors["patch_embed.proj.weight"]
    products = {}
    for key, layers in shape.products():
        biases = [tensors[f"{layer}.bias"] for layer in layers if f"{layer}.bias" in tensors]
        if len(biases) not in (0, len(layers)):
            raise _unknown(f"of {' and '.join(layers)} only one has a bias")
        products[key] = Plain([tensors[f"{layer}.weight"] for layer in layers], biases)
    image = torch.randn(1, shape.channels, *shape.image, generator=torch.Generator().manual_seed(0)).to(weight)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        theirs = model(image).double()
    finally:
        for module, mode in modes:
            module.training = mode
    ours = forward(Network(shape, products, tensors), image, weight.dtype).double()
    allowed = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.1
    if not theirs.isfinite().all():
        raise ValueError(
            "the model's own output on an image of random pixels is not finite: its weights are too large to check a snapshot of"
        )
    error = (ours - theirs).norm().item() if ours.shape == theirs.shape else float("inf")
    if not error <= allowed * theirs.norm().item():
        raise _unknown("its output is not what its parts say: something in it computes differently")
