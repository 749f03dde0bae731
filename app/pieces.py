"""Data as script files: what a page that is opened from disk can load, where nothing may be fetched.

A piece is JSON in which each array stands as {"array": its type, "at": where, "count": how many}, NaN and infinities
as {"number": its name}, and after it the arrays. It is packed with zlib, which browsers unpack, and written as base64
into a call of `leanscopePiece`. `app/stage/shelf.js` reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = {"float32": np.float32, "int32": np.int32, "uint8": np.uint8}
SHUFFLED = 64  # numbers of an array from which on its bytes are sorted by significance: it packs better


@dataclass(frozen=True)
class Piece:
    """One file: its script, and the hash of what is packed in it."""

    script: str
    sha256: str


def piece(version: str, value: Any) -> Piece:
    """`value` (JSON with arrays in it) as a script."""
    data = packed(value)
    sha256 = hashlib.sha256(data).hexdigest()
    text = base64.b64encode(data).decode()
    return Piece(f"leanscopePiece({json.dumps(version)}, {json.dumps(text)});\n", sha256)


def packed(value: Any) -> bytes:
    blobs: list[bytes] = []
    size = 0

    def laid(inner: Any) -> Any:
        nonlocal size
        if isinstance(inner, np.ndarray):
            array = compact(inner)
            blob = _shuffled(array)
            about = {"array": str(array.dtype), "at": size, "count": array.size}
            blobs.append(blob + b"\0" * (-len(blob) % 4))
            size += len(blobs[-1])
            return about
        if isinstance(inner, dict):
            return {str(key): laid(one) for key, one in inner.items()}
        if isinstance(inner, list | tuple):
            return [laid(one) for one in inner]
        return inner.item() if isinstance(inner, np.generic) else inner

    head = json.dumps(_finite(laid(value)), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    head += b" " * (-len(head) % 4)
    return zlib.compress(len(head).to_bytes(4, "little") + head + b"".join(blobs), 9)


def compact(array: np.ndarray) -> np.ndarray:
    """One of KINDS without loss, where there is one; else float32."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        fits = array.size == 0 or (array.min() >= -(2**31) and array.max() < 2**31)
        return array.astype(np.int32 if fits else np.float32)
    return array if str(array.dtype) in KINDS else array.astype(np.float32)


def _shuffled(array: np.ndarray) -> bytes:
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.itemsize == 1 or flat.size < SHUFFLED:
        return flat.tobytes()
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def _finite(value: Any) -> Any:
    """Numbers that JSON can't carry go by name: a browser would refuse the whole piece."""
    if isinstance(value, float) and not np.isfinite(value):
        return {"number": str(value).replace("nan", "NaN").replace("inf", "Infinity")}
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
