"""tests/golden/hostile: every file is refused, and the verdicts of the package `safetensors` agree.

The list of files that `safetensors` reads and we refuse, with the reason for each, is in
tests/golden/hostile/expected.json.
"""

import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

GOLDEN = Path(__file__).parent.parent / "golden"
HOSTILE = GOLDEN / "hostile"
CASES = json.loads((HOSTILE / "expected.json").read_text())
FILES = sorted(name for name in CASES if name.endswith(".safetensors"))
FOLDERS = sorted(name for name in CASES if not name.endswith(".safetensors"))

# Fragments of our messages for what `safetensors` lets pass; expected.json gives the reasons.
STRICTER = (
    "appears twice",
    "has the key",
    "has the unknown field",
    'has the unknown dtype "F4"',
    'has the unknown dtype "F6_E2M3"',
    'has the unknown dtype "F6_E3M2"',
    'has the unknown dtype "F8_E4M3FNUZ"',
    'has the unknown dtype "F8_E5M2FNUZ"',
    'has the unknown dtype "F8_E8M0"',
    'has the unknown dtype "C64"',
    "header must start with '{'",
    "which is no integer below 2^63",
    '"__metadata__" must be an object, but it is null',
    "must be an object, but it is an array",
)


@pytest.fixture(scope="module")
def hqq_cpp():
    return pytest.importorskip("hqq_cpp", reason="the module hqq_cpp is not built")


def peer_accepts(path) -> bool:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            file.keys()
    except (safetensors.SafetensorError, OSError):
        return False
    return True


def test_corpus_is_what_its_generator_writes(tmp_path):
    out = tmp_path / "hostile"
    subprocess.run([sys.executable, GOLDEN / "make_hostile.py", out], check=True)
    written = {p.relative_to(out): p for p in out.rglob("*") if p.is_file()}
    kept = {p.relative_to(HOSTILE): p for p in HOSTILE.rglob("*") if p.is_file()}
    assert sorted(written) == sorted(kept)
    for name, path in written.items():
        assert path.read_bytes() == kept[name].read_bytes(), name


def test_corpus_is_large_and_its_differences_have_reasons():
    assert len(CASES) >= 40
    messages = [case["message"] for case in CASES.values()]
    assert len(set(messages)) == len(messages)
    for name, case in CASES.items():
        assert ("reason" in case) == (case["safetensors"] == "accepts"), name


@pytest.mark.parametrize("name", FILES)
def test_verdict_of_safetensors(name):
    assert peer_accepts(HOSTILE / name) == (CASES[name]["safetensors"] == "accepts")


@pytest.mark.parametrize("name", FILES)
def test_file_is_refused(hqq_cpp, name):
    with pytest.raises(hqq_cpp.FormatError) as error:
        hqq_cpp.load_safetensors(HOSTILE / name)
    assert CASES[name]["message"] in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_refused(hqq_cpp, name, tmp_path):
    with pytest.raises(hqq_cpp.FormatError) as error:
        hqq_cpp.Checkpoint(HOSTILE / name)
    assert CASES[name]["message"] in str(error.value)
    with pytest.raises(hqq_cpp.FormatError):
        hqq_cpp.quantize_checkpoint(HOSTILE / name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def seed_files():
    """Valid files whose headers the mutations start from."""
    one = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    two = {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "I64", "shape": [1, 1], "data_offsets": [4, 12]},
        "y": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "z": {"dtype": "U8", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    return [
        (json.dumps(header, separators=(",", ":")).encode(), size)
        for header, size in ((one, 8), (two, 12), ({}, 0))
    ]


TOKENS = [
    *(b'"F32" "U8" "F8_E8M0" "C64" "dtype" "shape" "data_offsets" "__metadata__" "a" ""'.split()),
    *(b"{ } [ ] , : 0 1 2 4 8 12 -1 -0 1.5 1e2 9223372036854775808 18446744073709551616".split()),
    *(b"null true {} [] \xff \x00 \\ \\u0061 \\ud800 ,, NaN".split()),
    b"",
    b" ",
    b"\n",
]
# For the start of an object.
MEMBERS = [
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
    b'"b":{"shape":[],"data_offsets":[0,8],"dtype":"C64"},',
    b'"__metadata__":{"k":"v"},',
    b'"k":"v",',
    b'"dtype":"U8",',
]
TOKEN = re.compile(rb'"[^"]*"|[0-9]+|.', re.DOTALL)


def mutate(header: bytes, random_: random.Random) -> bytes:
    for _ in range(random_.choice((1, 1, 1, 2))):
        kind = random_.choice(("byte", "token", "token", "token", "member"))
        parts = TOKEN.findall(header) if kind != "byte" else re.findall(rb"(?s).", header)
        place = random_.randrange(len(parts))
        if kind == "member" and b"{" in parts:
            place = random_.choice([i for i, part in enumerate(parts) if part == b"{"])
            parts[place] += random_.choice(MEMBERS)
        else:
            parts[place] = random_.choice((b"", parts[place])) + random_.choice(TOKENS)
        header = b"".join(parts)
    return header


def mutated_file(random_: random.Random) -> bytes:
    header, size = random_.choice(seed_files())
    header = mutate(header, random_)
    length = len(header) + random_.choice((0,) * 30 + (-1, 1))
    size += random_.choice((0,) * 30 + (-1, 1, 8))
    return struct.pack("<Q", max(0, length)) + header + bytes(max(0, size))


def test_mutated_files_get_the_verdict_of_safetensors(hqq_cpp, tmp_path):
    random_ = random.Random(20250101)
    path = tmp_path / "mutated.safetensors"
    accepted = stricter = 0
    for step in range(2000):
        content = mutated_file(random_)
        path.write_bytes(content)
        peer = peer_accepts(path)
        try:
            hqq_cpp.load_safetensors(path)
        except hqq_cpp.FormatError as error:
            if peer:
                assert any(piece in str(error) for piece in STRICTER), (step, content, str(error))
                stricter += 1
        else:
            assert peer, (step, content, "safetensors refuses a file that we accept")
            accepted += 1
    # Both outcomes must really occur, or the comparison proves nothing.
    assert accepted > 30
    assert stricter > 20
