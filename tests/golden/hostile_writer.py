"""Writes one hostile file or folder, and remembers the message that it must be refused with."""

import json
import struct
from pathlib import Path

OUT = Path(__file__).parent / "hostile"
CASES = {}


def dump(obj) -> bytes:
    return json.dumps(obj, separators=(",", ":")).encode()


def raw(header: bytes, data: bytes = b"", length=None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def st(tensors: dict, data: bytes = bytes(8)) -> bytes:
    return raw(dump(tensors), data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def without(field) -> dict:
    return {key: value for key, value in entry().items() if key != field}


def add(name, message, peer, reason=None):
    assert name not in CASES and (reason is None) == (peer != "accepts"), name
    for other, case in CASES.items():
        assert message not in case["message"] and case["message"] not in message, (name, other)
    CASES[name] = {"message": message, "safetensors": peer}
    if reason is not None:
        CASES[name]["reason"] = reason


def file(name, content: bytes, message, accepted_because=None):
    peer = "refuses" if accepted_because is None else "accepts"
    add(f"{name}.safetensors", message, peer, accepted_because)
    (OUT / f"{name}.safetensors").write_bytes(content)


def folder(name, files: dict, message):
    add(name, message, None)
    for path, content in files.items():
        target = OUT / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else dump(content))
