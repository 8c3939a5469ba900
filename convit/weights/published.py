"""Published ImageNet-1K weights: where they are, how they are checked, and the cache.

| source   | variants            | checksum                                                                                     |
|----------|---------------------|----------------------------------------------------------------------------------------------|
| "timm"   | tiny, small, base   | SHA-256 that the Hugging Face hub states with the file; one that states none is not believed |
| "mindcv" | all six             | first eight digits of the SHA-256 in the file name, as in torch.hub's                         |
| "fair"   | tiny, small, base   | none is published: the SHA-256 of the first download is kept, checked ever after, and shown  |

Only https, or http to this machine. The usual variables for proxies hold (``https_proxy``, ``no_proxy``).
"""

import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

from convit.weights.files import check_regular, locked, read_text, replacing

logger = logging.getLogger("convit")

_FAIR = "https://dl.fbaipublicfiles.com/convit/"
_MINDCV = "https://download.mindspore.cn/toolkits/mindcv/convit/"
_HUB = "https://huggingface.co"  # HF_ENDPOINT replaces it
_TIMM = "/timm/{}.fb_in1k/resolve/main/model.safetensors"

ADDRESSES = {
    "timm": {name: _TIMM.format(name) for name in ("convit_tiny", "convit_small", "convit_base")},
    "mindcv": {
        "convit_tiny": _MINDCV + "convit_tiny-e31023f2.ckpt",
        "convit_tiny_plus": _MINDCV + "convit_tiny_plus-e9d7fb92.ckpt",
        "convit_small": _MINDCV + "convit_small-ba858604.ckpt",
        "convit_small_plus": _MINDCV + "convit_small_plus-2352b9f7.ckpt",
        "convit_base": _MINDCV + "convit_base-c61b808c.ckpt",
        "convit_base_plus": _MINDCV + "convit_base_plus-5c61c9ce.ckpt",
    },
    "fair": {name: f"{_FAIR}{name}.pth" for name in ("convit_tiny", "convit_small", "convit_base")},
}
TIMEOUT = 20  # seconds without an answer


def variants(source: str | None = None) -> tuple[str, ...]:
    """The variants with published weights: of one source, or of any."""
    return tuple(ADDRESSES[source]) if source else tuple(dict.fromkeys(name for names in ADDRESSES.values() for name in names))


def fetch(name: str, source: str | None = None) -> Path:
    """The path of a variant's published weights; downloaded at first, then from the cache.

    The cache is ``convit`` in torch hub's folder of checkpoints (``TORCH_HOME``). A file appears there only when it is complete and its
    checksum is right, and is checked again at each use. Weights that ``huggingface_hub`` has already cached are used as they are.

    Args:
        name: The variant.
        source: "timm" (tiny, small, base), "mindcv" (all six) or "fair" (tiny, small, base); default: timm's if it has the variant,
            else MindCV's.

    Raises:
        ValueError: Unknown name or source; or the checksum is wrong.
        OSError: The download failed; the message has the address and how to pass a file instead.
    """
    if source is None:
        source = "mindcv" if name in ADDRESSES["mindcv"] and name not in ADDRESSES["timm"] else "timm"
    if source not in ADDRESSES:
        raise ValueError(f"source must be one of {', '.join(ADDRESSES)}, got {source!r}")
    if name not in ADDRESSES[source]:
        raise ValueError(f"{source} publishes no weights for {name!r}, only for {', '.join(ADDRESSES[source])}")
    address = ADDRESSES[source][name]
    if source == "timm":
        known = _hub_cache(name)
        if known is not None:
            return known
        address = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/") + address
    path = cache_folder() / (f"{name}.fb_in1k.safetensors" if source == "timm" else address.rsplit("/", 1)[1])
    record = path.with_name(path.name + ".sha256")
    prefix = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    expected = prefix[1] if prefix else ""
    if path.exists():
        if record.exists():
            expected = read_text(record, 1000).strip()
            if not re.fullmatch("[0-9a-f]{64}", expected):
                raise ValueError(f"{record} holds no SHA-256: delete it and {path.name} to download them again")
        check_regular(path)
        with open(path, "rb") as file:
            digest = _sha256(file)
        if not digest.startswith(expected):
            raise ValueError(f"{path} is damaged: its SHA-256 is {digest}, expected {expected}; delete it to download it again")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _download(address, path, expected, from_hub=source == "timm")
        with replacing(record) as file:
            file.write(digest.encode())
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(
            f"cannot download {address} ({str(reason) or type(reason).__name__}). Fetch it where there is a network and pass the file: "
            f"create_model({name!r}, pretrained='/path/to/{path.name}'), or put it at {path}"
        ) from error
    if source == "fair":
        logger.warning("%s: its publisher states no checksum; SHA-256 %s is what came now, and is expected from now on", path, digest)
    return path


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    sha = hashlib.sha256()
    while chunk := file.read(1 << 20):
        sha.update(chunk)
    return sha.hexdigest()


def cache_folder() -> Path:
    """``convit`` in torch hub's folder of checkpoints; torch itself is not needed."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "hub"):
        return Path(torch.hub.get_dir()) / "checkpoints" / "convit"
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints" / "convit"


def _hub_cache(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(f"timm/{name}.fb_in1k", "model.safetensors")
    return Path(found) if isinstance(found, str) else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed addresses, and remembers the checksum that the hub states in its redirect to the storage."""

    checksum = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:
        self.checksum = self.checksum or _stated(headers)
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(address: str) -> None:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")):
        raise OSError(f"{address[:200]} is neither https nor on this machine")


def _stated(headers: Any) -> str:
    tag = (headers.get("X-Linked-ETag") or "").strip('W/"')
    return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else ""


def _download(address: str, path: Path, expected: str, *, from_hub: bool) -> str:
    """Download to ``path`` if the length and the checksum are right; return the SHA-256.

    What has come before the connection broke waits in a ``.part`` file, and the next call goes on behind it.
    """
    with locked(path.with_name(f".{path.name}.part")) as part:
        if path.exists():  # another process has downloaded it meanwhile
            Path(part.name).unlink()
            with open(path, "rb") as file:
                return _sha256(file)
        for begin in dict.fromkeys((part.seek(0, os.SEEK_END), 0)):
            try:
                stated = _receive(address, part, begin)
            except urllib.error.HTTPError as error:
                if begin and error.code == 416:  # there is nothing behind what is here: it is another file's, or whole
                    continue
                raise
            if from_hub and not stated:
                raise OSError("the server states no checksum for it")
            digest, wanted = _sha256(part), stated if from_hub else expected
            if digest.startswith(wanted):
                os.replace(part.name, path)
                return digest
        Path(part.name).unlink()
        raise ValueError(f"{address} has the SHA-256 {digest}, expected {wanted}: damaged, or not the published file")


def _receive(address: str, part: BinaryIO, begin: int) -> str:
    """Write the file at ``address`` to ``part``, from byte ``begin`` on if the server can; the checksum that the hub states, or nothing."""
    _check_address(address)
    redirects = _Redirects()
    request = urllib.request.Request(address, headers={"User-Agent": "convit"} | ({"Range": f"bytes={begin}-"} if begin else {}))
    with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as answer:
        size = begin if answer.status == 206 else 0
        length = answer.headers.get("Content-Length") or ""
        whole = size + int(length) if length.isdecimal() else None
        part.truncate(size)
        try:
            while chunk := answer.read(1 << 20):
                size += part.write(chunk)
        finally:
            part.flush()
            os.fsync(part.fileno())
        if whole is not None and size < whole:
            raise OSError(f"the connection ended after {size} of {whole} bytes; what came is kept, and the next try goes on")
        return redirects.checksum or _stated(answer.headers)
