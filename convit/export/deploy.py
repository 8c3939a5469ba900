"""A ConViT for other runtimes: the same function as the eager model in evaluation mode, written so that exporters make a small graph.

What does not depend on the image is folded into constants, in float64:

    position   the factored tables Px, and Py with the gate: two small matrix products per GPSA layer, no softmax
    content    the scale into the query projection; query, key and value projections into one
    last block its queries, projection and perceptron only for the class token, when that is all the head reads

With ``dynamic_size`` the tables and the position embedding follow the size of the image: the tables are normalised exponentials of the
grid's differences, gh^2 + gw^2 numbers per head, and the embedding is resampled (bicubic) by two small matrix products.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convit.architecture import bicubic
from convit.kernels.gpsa.reference import position_tables


class _Attention(nn.Module):
    """One GPSA or MHSA layer. ``fused`` leaves the content half to ``scaled_dot_product_attention``, else it is spelt out."""

    weight: Tensor
    bias: Tensor | None
    proj: nn.Linear
    content_gate: Tensor
    gate: Tensor
    position: Tensor
    px: Tensor
    py: Tensor

    def __init__(self, attn: Any, grid: tuple[int, int] | None, class_only: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.class_only, self.fused, self.grid = attn.num_heads, class_only, fused, grid
        self.local = hasattr(attn, "gating_param")
        weight = torch.cat([attn.qk.weight, attn.v.weight]) if self.local else attn.qkv.weight
        bias = torch.cat([attn.qk.bias, attn.v.bias]) if self.local and attn.qk.bias is not None else None
        bias = bias if self.local else attn.qkv.bias
        scale = torch.ones(weight.shape[0], 1, dtype=torch.float64, device=weight.device)
        scale[: weight.shape[1]] = attn.scale
        self.register_buffer("weight", (weight.detach().double() * scale).float().t().contiguous())
        self.register_buffer("bias", None if bias is None else (bias.detach().double() * scale[:, 0]).float())
        self.proj = attn.proj
        if self.local:
            gate = attn.gating_param.detach().double().sigmoid()[:, None, None]
            position = attn.pos_proj.weight.detach().double()
            self.register_buffer("gate", gate.float())
            self.register_buffer("content_gate", (1 - gate).float())
            if grid is None:
                self.register_buffer("position", position.float())
            else:
                px, py = position_tables(position, grid)
                self.register_buffer("py", (gate * py).float())
                self.register_buffer("px", px.float()[:, None].contiguous())

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens, dim = x.shape[1:]
        head = dim // self.heads
        if self.class_only:
            q = self._linear(x[:, :1], 0, dim).view(-1, 1, self.heads, head).transpose(1, 2)
            k, v = self._linear(x, dim, 3 * dim).view(-1, tokens, 2, self.heads, head).permute(2, 0, 3, 1, 4).unbind(0)
            tokens = 1
        else:
            q, k, v = self._linear(x, 0, 3 * dim).view(-1, tokens, 3, self.heads, head).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0) if self.fused else (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        if self.local:
            px, py = self._tables(grid)
            gh, gw = grid
            rows = py @ v.reshape(-1, self.heads, gh, gw * head)
            position = px @ rows.reshape(-1, self.heads, gh, gw, head)
            out = out * self.content_gate + position.reshape(-1, self.heads, tokens, head)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(-1, tokens, dim))
        return projected

    def _linear(self, x: Tensor, first: int, last: int) -> Tensor:
        out = x @ self.weight[:, first:last]
        return out if self.bias is None else out + self.bias[first:last]

    def _tables(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if self.grid is not None:
            return self.px, self.py

        def table(size: int, linear: Tensor) -> Tensor:
            r = torch.arange(size, device=linear.device, dtype=linear.dtype)
            d = r[None, :] - r[:, None]
            logits = linear[:, None, None] * d + self.position[:, 2, None, None] * d**2
            table = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
            return table / table.sum(dim=-1, keepdim=True)

        return table(grid[1], self.position[:, 0])[:, None], table(grid[0], self.position[:, 1]) * self.gate


class Deployed(nn.Module):
    """Images [B, in_chans, H, W] to logits [B, num_classes]; see the module. Holds copies, not the model's parameters.

    Args:
        model: A ``convit.ConViT``; taken in float32.
        dynamic_size: Take images of any multiple of the patch size, else only of ``model.patch_embed.img_size``.
        fused: Leave the content half to torch's ``scaled_dot_product_attention``; for runtimes that are torch.
    """

    blocks: Any
    attns: Any
    prefix_tokens: Tensor
    pos_embed: Any  # a tensor or None

    def __init__(self, model: Any, *, dynamic_size: bool, fused: bool) -> None:
        super().__init__()
        model = copy.deepcopy(model).float().eval().requires_grad_(False)
        depth = len(model.blocks)
        self.grid = None if dynamic_size else model.patch_embed.grid_size
        self.old_grid = model.patch_embed.grid_size
        self.local, self.pool = model.local_up_to_layer, model.global_pool
        self.prefix = model.num_prefix_tokens
        self.patch, self.norm, self.head = model.patch_embed.proj, model.norm, model.head
        self.blocks = nn.ModuleList(model.blocks)
        last = depth - 1 if self.pool == "token" and self.local < depth else None
        self.attns = nn.ModuleList(_Attention(b.attn, self.grid, i == last, fused) for i, b in enumerate(model.blocks))
        for block in model.blocks:
            block.attn = nn.Identity()  # its weights are in self.attns
        tokens = [token.detach() for token in (model.cls_token, model.reg_token) if token is not None]
        self.register_buffer("prefix_tokens", torch.cat(tokens, dim=1))
        self.register_buffer("pos_embed", None if model.pos_embed is None else model.pos_embed.detach())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images)
        grid = self.grid if self.grid is not None else (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + (self.pos_embed if self.grid is not None else self._resampled(grid))
        for i, (block, attn) in enumerate(zip(self.blocks, self.attns, strict=True)):
            if i == self.local:
                x = self._join_prefix(x)
            y = attn(block.norm1(x), grid)
            x = (x[:, :1] if attn.class_only else x) + y
            x = x + block.mlp(block.norm2(x))
        if self.local == len(self.blocks):
            x = self._join_prefix(x)
        x = self.norm(x[:, 0] if self.pool == "token" else x)
        logits: Tensor = self.head(x[:, self.prefix :].mean(dim=1) if self.pool == "avg" else x)
        return logits

    def _join_prefix(self, x: Tensor) -> Tensor:
        return torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1)

    def _resampled(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding on ``grid``, as ``convit.architecture.resample`` does it, in operations that every exporter knows."""
        old_h, old_w = self.old_grid
        rows, columns = self._bicubic(old_h, grid[0]), self._bicubic(old_w, grid[1])
        dim = self.pos_embed.shape[-1]
        table: Tensor = (rows @ self.pos_embed.reshape(old_h, old_w * dim)).reshape(-1, old_w, dim)
        return (columns @ table).reshape(1, -1, dim)

    def _bicubic(self, old: int, new: int) -> Tensor:
        index = torch.arange(new, device=self.pos_embed.device, dtype=torch.float32)
        scale = old / (index[-1:] + 1)
        centres = (index + 0.5) * scale
        source = torch.arange(old, device=self.pos_embed.device, dtype=torch.float32) + 0.5
        weights: Tensor = bicubic(centres, source, scale.clamp(min=1.0))
        return weights
