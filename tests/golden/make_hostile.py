"""Writes tests/golden/hostile: small files and folders that must be refused, and expected.json.

    python make_hostile.py [FOLDER]

It rewrites FOLDER (tests/golden/hostile), with the same bytes every time.

Each case has a fragment of the message that it is refused with, different from every other case's,
and what the Python package `safetensors` says about the same file: "accepts" or "refuses", or null
for folders, which that package does not open. Where the verdicts differ, `reason` says why.
"""

import json
import shutil
import struct
import sys
from pathlib import Path

import hostile_writer
from hostile_writer import CASES, dump, entry, file, folder, raw, st, without

# Why a file that `safetensors` reads is refused here.
DUPLICATE = "JSON does not say which of two equal keys counts, so two readers could see two models"
ONLY_FIELDS = "a tensor has exactly the fields dtype, shape and data_offsets"
BRACE = "the format says that a header begins with '{'"
NO_DTYPE = "no tensor type of this library: hqq::DType has the types that models are made of"
SIGNED = "sizes are int64 in every library that would use the tensor"
OBJECT = "the format says that a tensor is described by an object and __metadata__ is one"


def lengths():
    file("empty_file", b"", "the file is empty")
    file("seven_bytes", bytes(7), "the file has 7 bytes, too few for")
    file("length_zero", bytes(8), "the header has 0 bytes, but {} alone takes 2")
    file("length_one", raw(b"{"), "the header has 1 bytes, but {} alone takes 2")
    file("length_past_end", raw(b"{}", length=3), "claims 3 bytes, but only 2 follow")
    file("length_over_limit", raw(b"{}", length=100_000_001), "claims 100000001 bytes, more than")
    file("length_huge", raw(b"{}", length=2**63), "claims 9223372036854775808 bytes, more than")
    file("length_wraps", raw(b"{}", length=2**64 - 8), "claims 18446744073709551608 bytes, more")
    file("length_big_endian", struct.pack(">Q", 2) + b"{}", "claims 144115188075855872 bytes, more")
    file("length_too_short", raw(dump({"t": entry()}), bytes(8), length=20), "at byte 21 of it")


def syntax():
    file("not_an_object", raw(b"[]"), "must start with '{', but it starts with \"[\"")
    file("leading_space", raw(b" {}"), "must start with '{', but it starts with \" \"", BRACE)
    file("leading_newline", raw(b"\n{}"), 'but it starts with "\\x0a"', BRACE)
    file("byte_order_mark", raw(b"\xef\xbb\xbf{}"), 'but it starts with "\\xef"')
    file("pickle", raw(b"\x80\x02}q\x00."), 'but it starts with "\\x80"')
    file("bad_utf8", raw(b'{"\xff":{}}'), "at byte 3 of it: syntax error while parsing object key")
    file("overlong_utf8", raw(b'{"t_\xc0\xaf":{}}'), "at byte 5 of it: syntax error")
    file("lone_surrogate", raw(b'{"\\ud800":{}}'), "surrogate U+D800..U+DBFF must be followed")
    file("raw_newline", raw(b'{"t\n":{}}'), "control character U+000A (LF) must be escaped")
    file("cut_short", raw(b'{"t":{"dtype":"F32"'), "parsing object - unexpected end of input")
    file("text_after", raw(b"{}x"), "at byte 3 of it: syntax error while parsing value")
    file("object_after", raw(b"{}{}"), "unexpected '{'; expected end of input")
    file("nul_after", raw(b"{}\0\0"), "has a NUL at byte 2 of it")
    file("nul_and_text_after", raw(b"{} \0{}"), "has a NUL at byte 3 of it")
    file("comment", raw(b"{  /* */}"), "at byte 4 of it: syntax error while parsing object key")
    file("single_quotes", raw(b"{     't':{}}"), "at byte 7 of it: syntax error")
    file("trailing_comma", raw(dump({"t": entry()})[:-1] + b",}", bytes(8)), "unexpected '}'")
    file("not_a_number", raw(b'{"t":    NaN}'), "at byte 10 of it: syntax error")
    file("leading_zero", raw(b'{"t":{"shape":   [01]}}'), "unexpected number literal; expected")


def nesting():
    deep = b"[" * 5000
    file(
        "deep_arrays",
        raw(b'{"deep1":' + deep),
        'entry "deep1" must be an object, but it is an array',
    )
    file("deep_shape", raw(b'{"deep2":{"shape":' + deep), 'in shape of tensor "deep2" must be')
    file("deep_metadata", raw(b'{"__metadata__":' + b'{"m":' * 3000), 'but "m" is an object')
    file("deep_field", raw(b'{"deep3":{"dtype":' + b'{"m":' * 3000), 'dtype of tensor "deep3" must')
    file(
        "deep_offsets",
        raw(b'{"deep4":{"data_offsets":[' + b'{"m":' * 3000),
        'offsets of tensor "deep4"',
    )
    file(
        "deep_unknown",
        raw(b'{"deep5":{"extra":' + deep),
        'tensor "deep5" has the unknown field "extra"',
    )


def entries():
    two = dump(entry())
    empty = dump(entry("U8", (0,), (0, 0)))
    file(
        "tensor_twice",
        raw(b'{"twice":' + two + b',"twice":' + two + b"}", bytes(8)),
        'tensor "twice" appears twice',
        DUPLICATE,
    )
    file(
        "tensor_twice_escaped",
        raw(b'{"ab":' + empty + b',"\\u0061b":' + two + b"}", bytes(8)),
        'tensor "ab" appears twice',
        DUPLICATE,
    )
    file("dtype_twice", raw(b'{"d":{"dtype":"U8",' + two[1:] + b"}", bytes(8)), "field dtype twice")
    file("shape_twice", raw(b'{"d":{"shape":[9],' + two[1:] + b"}", bytes(8)), "field shape twice")
    file(
        "offsets_twice",
        raw(b'{"d":{"data_offsets":[0,8],' + two[1:] + b"}", bytes(8)),
        "field data_offsets twice",
    )
    file(
        "unknown_field",
        st({"u": entry(strides=[1])}),
        'has the unknown field "strides"',
        ONLY_FIELDS,
    )
    file("no_dtype", st({"n": without("dtype")}), "has no dtype")
    file("no_shape", st({"n": without("shape")}), "has no shape")
    file("no_offsets", st({"n": without("data_offsets")}), "has no data_offsets")
    file("entry_empty", raw(b'{"void":{}}'), 'tensor "void" has no')
    file("entry_null", raw(b'{"e1":null}'), 'entry "e1" must be an object, but it is null')
    file("entry_text", raw(b'{"e2":"F32"}'), 'entry "e2" must be an object, but it is a string')
    file("entry_number", raw(b'{"e3":3}'), 'entry "e3" must be an object, but it is a number')
    file(
        "entry_list",
        raw(b'{"list":["F32",[2],[0,8]]}', bytes(8)),
        'entry "list" must be an object, but it is an array',
        OBJECT,
    )


def metadata():
    for name, value, message, *reason in (
        ("text", b'"pt"', '"__metadata__" must be an object, but it is a string'),
        ("null", b"null", '"__metadata__" must be an object, but it is null', OBJECT),
        ("number", b'{"a":1}', 'strings to strings, but "a" is a number'),
        ("null_value", b'{"b":null}', 'strings to strings, but "b" is null'),
        ("list", b'{"c":[]}', 'strings to strings, but "c" is an array'),
        ("true", b'{"d":true}', 'strings to strings, but "d" is true'),
        ("twice", b'{},"__metadata__":{}', "__metadata__ appears twice"),
        ("key_twice", b'{"k":"1","k":"2"}', '__metadata__ has the key "k" twice', DUPLICATE),
    ):
        file(f"metadata_{name}", raw(b'{"__metadata__":' + value + b"}"), message, *reason)


def types_and_shapes():
    file("dtype_unknown", st({"t": entry("F31")}), 'has the unknown dtype "F31"')
    file("dtype_lower_case", st({"t": entry("f32")}), 'has the unknown dtype "f32"')
    file("dtype_empty", st({"t": entry("")}), 'has the unknown dtype ""')
    file("dtype_number", st({"type1": entry(32)}), 'dtype of tensor "type1" must be a string')
    file("dtype_null", st({"type2": entry(None)}), 'dtype of tensor "type2" must be a string')
    file("dtype_f4", st({"t": entry("F4", (16,))}), 'has the unknown dtype "F4"', NO_DTYPE)
    file("dtype_f8_e8m0", st({"t": entry("F8_E8M0", (8,))}), 'unknown dtype "F8_E8M0"', NO_DTYPE)
    file("dtype_complex", st({"t": entry("C64", (1,))}), 'has the unknown dtype "C64"', NO_DTYPE)
    file("shape_negative", st({"t": entry(shape=[-2])}), "hold -2, which is negative")
    file("shape_negatives", st({"t": entry(shape=[-1, -3])}), "hold -1, which is negative")
    file(
        "shape_minus_zero",
        raw(b'{"t":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "hold -0, which is negative",
    )
    file("shape_float", st({"t": entry(shape=[2.0])}), "hold 2.0, which is no integer below 2^63")
    file(
        "shape_exponent",
        raw(b'{"t":{"dtype":"U8","shape":[1e1],"data_offsets":[0,10]}}', bytes(10)),
        "hold 1e1, which is no integer below 2^63",
    )
    file("shape_too_big_number", raw(b'{"t":{"shape":[1e999]}}'), "number overflow parsing '1e999'")
    file("shape_text", st({"s1": entry(shape=["2"])}), 'in shape of tensor "s1" must be integers')
    file("shape_null", st({"s2": entry(shape=[None])}), 'in shape of tensor "s2" must be integers')
    file("shape_not_a_list", st({"s3": entry(shape=2)}), 'shape of tensor "s3" must be an array')
    file(
        "shape_above_int64",
        st({"t": entry(shape=[2**63, 0], offsets=(0, 0))}, b""),
        "hold 9223372036854775808, which is no integer",
        SIGNED,
    )
    file(
        "shape_above_uint64",
        st({"t": entry(shape=[2**64, 0], offsets=(0, 0))}, b""),
        "hold 18446744073709551616, which is no integer",
    )
    file(
        "numel_overflow",
        st({"t": entry(shape=[2**32, 2**32])}),
        "(F32 [4294967296, 4294967296]) has more than 2^63 bytes",
    )
    file(
        "numel_wraps_to_two",
        st({"t": entry(shape=[2**63 - 1, 2**63 - 1, 2])}),
        "9223372036854775807, 2]) has more than 2^63 bytes",
    )
    file(
        "nbytes_overflow",
        st({"t": entry("F64", [2**61 + 1])}),
        "(F64 [2305843009213693953]) has more than 2^63 bytes",
    )
    file(
        "overflow_before_zero",
        st({"t": entry("U8", [2**40, 2**40, 0], (0, 0))}, b""),
        "1099511627776, 0]) has more than 2^63 bytes",
    )


def offsets():
    ok = entry()
    file("offsets_one", st({"o1": entry(offsets=[0])}), 'tensor "o1" must have exactly two')
    file("offsets_three", st({"o3": entry(offsets=[0, 8, 8])}), 'tensor "o3" must have exactly two')
    file("offsets_none", st({"o0": entry(offsets=[])}), 'tensor "o0" must have exactly two')
    file(
        "offsets_object",
        st({"of1": entry(offsets={})}),
        'data_offsets of tensor "of1" must be an array',
    )
    file(
        "offsets_text",
        st({"of2": entry(offsets=["0", "8"])}),
        'data_offsets of tensor "of2" must be int',
    )
    file("offsets_negative", st({"t": entry(offsets=[-8, 0])}), "hold -8, which is negative")
    file("offsets_float", st({"t": entry(offsets=[0, 8.5])}), "hold 8.5, which is no integer")
    file(
        "offsets_above_int64",
        st({"t": entry(offsets=[2**63 + 8, 2**63 + 16])}),
        "hold 9223372036854775816, which is no integer",
    )
    file(
        "offsets_backwards",
        st({"t": entry(offsets=[8, 0])}),
        "ends at byte 0, before it begins at byte 8",
    )
    file(
        "size_too_small", st({"t": entry(shape=[3])}), "takes 12 bytes, but its data_offsets span 8"
    )
    file(
        "size_too_large", st({"t": entry(shape=[1])}), "takes 4 bytes, but its data_offsets span 8"
    )
    file(
        "scalar_of_eight_bytes",
        st({"t": entry("U8", [])}),
        "takes 1 bytes, but its data_offsets span 8",
    )
    file("data_missing", st({"t": ok}, b""), "ends at byte 8, but the data has only 0 bytes")
    file("data_cut", st({"t": ok}, bytes(7)), "ends at byte 8, but the data has only 7 bytes")
    file("data_too_long", st({"t": ok}, bytes(9)), "end at byte 8 of the data, but 1 more bytes")
    file("data_without_tensor", raw(b"{}", bytes(5)), "end at byte 0 of the data, but 5 more bytes")
    file(
        "hole_at_start",
        st({"t": entry(offsets=[8, 16])}, bytes(16)),
        "bytes 0 to 8 of the data belong",
    )
    file(
        "hole_between",
        st({"a": ok, "b": entry(offsets=[12, 20])}, bytes(20)),
        "bytes 8 to 12 of the data",
    )
    file(
        "overlap",
        st({"a": ok, "b": entry(offsets=[4, 12])}, bytes(12)),
        'tensor "b" begins at byte 4, inside tensor "a"',
    )
    file(
        "same_bytes_twice", st({"a": ok, "c": ok}), 'tensor "c" begins at byte 0, inside tensor "a"'
    )
    file(
        "empty_inside_other",
        st({"a": ok, "e": entry(shape=[0], offsets=[4, 4])}),
        'tensor "e" begins at byte 4, inside tensor "a"',
    )
    file(
        "empty_past_end",
        st({"t": entry(shape=[0], offsets=[9, 9])}),
        "ends at byte 9, but the data has only 8",
    )


GOOD = st({"a": entry()})
OTHER = st({"b": entry()})
INDEX = "model.safetensors.index.json"


def index(weight_map, **shards) -> dict:
    files = {INDEX: {"metadata": {}, "weight_map": weight_map}}
    return files | {f"{name}.safetensors": content for name, content in shards.items()}


def indexes():
    folder(
        "index_not_json",
        {INDEX: b"{'weight_map': {}}"},
        'index_not_json/model.safetensors.index.json"] not JSON',
    )
    folder(
        "index_empty",
        {INDEX: b""},
        "not JSON at byte 1: the text is empty",
    )
    folder("index_list", {INDEX: []}, "the index must be a JSON object")
    folder("index_no_map", {INDEX: {"metadata": {}}}, "the index has no weight_map")
    folder(
        "index_map_list",
        {INDEX: {"weight_map": []}},
        "weight_map must be an object, but it is array",
    )
    folder("index_map_empty", {INDEX: {"weight_map": {}}}, "weight_map lists no tensor")
    folder(
        "index_shard_number",
        index({"a": 1}),
        'the shard of tensor "a" must be a string, but it is number',
    )
    folder(
        "index_twice",
        {INDEX: b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "x.safetensors": GOOD},
        'JSON key "a" appears twice in the same object',
    )
    folder(
        "index_map_twice",
        {INDEX: b'{"weight_map":{"a":"x.safetensors"},"weight_map":{}}'},
        'JSON key "weight_map" appears twice',
    )
    folder("index_deep", {INDEX: b'{"weight_map":' + b"[" * 5000}, "nested deeper than 64 levels")
    folder("index_nul", {INDEX: b'{"weight_map":{}}\0'}, "not JSON: NUL byte at byte 17")
    folder(
        "index_bad_utf8",
        {INDEX: b'{"weight_map":{"\xff":"x.safetensors"}}'},
        "not JSON at byte 17: syntax error",
    )
    for name, shard, message in (
        ("absolute", "/etc/passwd", '"/etc/passwd", but an absolute path'),
        ("drive", "C:x.safetensors", '"C:x.safetensors", but an absolute path'),
        ("unc", "\\\\host\\x.safetensors", 'host\\\\x.safetensors", but an absolute path'),
        ("parent", "../good.safetensors", '"../good.safetensors", but the path leaves'),
        ("inner_parent", "x/../../y.safetensors", '"x/../../y.safetensors", but the path'),
        ("backslash_parent", "..\\z.safetensors", 'z.safetensors", but the path leaves'),
        ("dots", "..", '"..", but the path leaves'),
        ("subfolder", "sub/x.safetensors", '"sub/x.safetensors", but shards must lie in'),
        ("empty", "", "but the name is empty"),
        ("nul", "x\0.safetensors", "but control characters are not allowed"),
        ("other_kind", "config.json", '"config.json", but a name ending in .safetensors'),
    ):
        folder(f"path_{name}", index({"a": shard}) | {"sub/x.safetensors": GOOD}, message)
    folder(
        "shard_missing",
        index({"a": "x.safetensors", "b": "gone.safetensors"}, x=GOOD),
        'shard "gone.safetensors", which the index lists, is missing',
    )
    folder(
        "shard_broken", index({"a": "x.safetensors"}, x=GOOD[:-3]), "but the data has only 5 bytes"
    )
    folder(
        "shards_swapped",
        index({"a": "y.safetensors", "b": "x.safetensors"}, x=GOOD, y=OTHER),
        'puts tensor "a" into "y.safetensors", but it is in "x.safetensors"',
    )
    folder(
        "tensor_in_no_shard",
        index({"a": "x.safetensors", "c": "x.safetensors"}, x=GOOD),
        'puts tensor "c" into "x.safetensors", but no shard holds it',
    )
    folder(
        "tensor_in_two_shards",
        index(
            {"a": "x.safetensors", "b": "y.safetensors"},
            x=GOOD,
            y=st({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(16)),
        ),
        'tensor "a" is in two shards, "x.safetensors" and "y.safetensors"',
    )
    folder(
        "tensor_not_listed",
        index(
            {"a": "x.safetensors"}, x=st({"a": entry(), "extra": entry(offsets=[8, 16])}, bytes(16))
        ),
        'holds tensor "extra", which the index does not list',
    )


def folders():
    model = {"model.safetensors": GOOD}
    folder("no_model", {"config.json": {}}, 'no_model" has neither model.safetensors nor')
    folder("only_pickle", {"pytorch_model.bin": b"\x80"}, 'index.json; it has "pytorch_model.bin"')
    folder("model_broken", {"model.safetensors": raw(b"{}", b"abc")}, "but 3 more bytes follow")
    folder(
        "config_not_json",
        model | {"config.json": b"model_type: llama"},
        'config_not_json/config.json"] not JSON',
    )
    folder(
        "config_empty",
        model | {"config.json": b""},
        'config_empty/config.json"] not JSON at byte 1',
    )
    folder("config_list", model | {"config.json": []}, "config.json must hold a JSON object")
    folder("config_twice", model | {"config.json": b'{"q":1,"q":2}'}, 'JSON key "q" appears twice')
    folder(
        "config_deep",
        model | {"config.json": b'{"a":' * 65 + b"1" + b"}" * 65},
        'config_deep/config.json"] JSON is nested deeper than 64',
    )
    folder(
        "config_infinity",
        model | {"config.json": b'{"limit": [0.0, +Infinity]}'},
        'config_infinity/config.json"] not JSON at byte 17',
    )
    folder("config_nan", model | {"config.json": b'{"limit":nan}'}, 'config_nan/config.json"] not')
    folder("config_nul", model | {"config.json": b"{}\0"}, "not JSON: NUL byte at byte 2")
    folder(
        "config_byte_order_mark",
        model | {"config.json": b"\xef\xbb\xbf{}"},
        "starts with a byte order mark",
    )
    folder(
        "config_bad_utf8",
        model | {"config.json": b'{"a":"\xed\xa0\x80"}'},
        "not JSON at byte 8: syntax error",
    )
    folder(
        "config_is_folder",
        model | {"config.json/x": b"x"},
        'config_is_folder/config.json" is a folder',
    )


def main():
    if len(sys.argv) > 1:
        hostile_writer.OUT = Path(sys.argv[1])
    out = hostile_writer.OUT
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for group in (
        lengths,
        syntax,
        nesting,
        entries,
        metadata,
        types_and_shapes,
        offsets,
        indexes,
        folders,
    ):
        group()
    text = json.dumps(CASES, indent=1, sort_keys=True) + "\n"
    (out / "expected.json").write_text(text)


if __name__ == "__main__":
    main()
