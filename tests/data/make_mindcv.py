"""How mindcv_tiny*.ckpt and mindcv_tiny.npz were made: by MindSpore 2.10.0 and MindCV 0.3.0 themselves (numpy<2).

    python tests/data/make_mindcv.py tests/data

A 16-wide ConViT of 3 blocks (2 of them local) on the 196 patches that MindCV's relative positions are made for. The weights are
spread widely, so that the kind of GELU and the LayerNorm eps show in the logits. The second file has a CRC; the third makes
MindSpore split tensors over several messages, as it does beyond 512 MB.
"""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindcv.models.convit import ConViT
from mindspore.train import serialization

out = Path(sys.argv[1])
ms.set_seed(0)
model = ConViT(image_size=56, patch_size=4, embed_dim=16, num_heads=4, depth=3, local_up_to_layer=2, num_classes=10, drop_path_rate=0.0)
model.set_train(False)
rng = np.random.default_rng(0)
for parameter in model.get_parameters():
    value = parameter.asnumpy()
    spread = 0.05 if parameter.name == "pos_embed" else 0.3
    parameter.set_data(ms.Tensor((value + spread * rng.standard_normal(value.shape)).astype(np.float32)))
images = rng.standard_normal((1, 3, 56, 56)).astype(np.float32)
# one file holds everything a test needs: images as float16, which MindCV saw in the same rounding
images = images.astype(np.float16)
logits = model(ms.Tensor(images.astype(np.float32))).asnumpy()
np.savez_compressed(out / "mindcv_tiny.npz", images=images, logits=logits)
ms.save_checkpoint(model, str(out / "mindcv_tiny.ckpt"))
head = [{"name": p.name, "data": p} for p in model.get_parameters() if p.name.startswith(("classifier", "norm"))]
ms.save_checkpoint(head, str(out / "mindcv_crc.ckpt"), crc_check=True, append_dict={"epoch_num": 3, "note": "text"})
serialization.SLICE_SIZE = 1  # kB; 512 MB in use
sliced = [{"name": p.name, "data": ms.Tensor(p.asnumpy())} for p in model.get_parameters() if p.name == "blocks.0.mlp.fc1.weight"]
serialization._exec_save(
    str(out / "mindcv_sliced.ckpt"), {p["name"]: [list(p["data"].shape), "Float32", p["data"].asnumpy()] for p in sliced}
)
ms.save_checkpoint(
    [
        {"name": "scalar", "data": ms.Tensor(3.5, ms.float32)},
        {"name": "bf16", "data": ms.Tensor([[1.0, -2.5, 3.0]], ms.bfloat16)},
        {"name": "fp16", "data": ms.Tensor([0.5, 65504.0], ms.float16)},
        {"name": "int8", "data": ms.Tensor([-1, 2], ms.int8)},
        {"name": "bool", "data": ms.Tensor([True, False])},
    ],
    str(out / "mindspore_types.ckpt"),
)
for mode in ("AES-GCM", "AES-CBC", "SM4-CBC"):
    ms.save_checkpoint(head, str(out / f"mindcv_{mode.lower()}.ckpt"), enc_key=b"0123456789abcdef", enc_mode=mode)
