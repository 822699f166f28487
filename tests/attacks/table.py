"""The attacks: name, what is done to a valid file, and what the message has to name.

Rows of HEADER return the whole file. Rows of MANIFEST change the manifest, rows of TENSORS the file taken
apart; both with checksums that are right, since whoever lies can compute a CRC.
"""

import io
import json
import pickle
import struct

import torch

from . import assemble

HUGE = 10**4000  # within what Python converts from decimal, beyond what it converts back


def _u64(length, rest=b"{}"):
    return lambda file: struct.pack("<Q", length) + rest


def _text(header, data=b""):
    return lambda file: assemble(header, data)


def _entry(data=b"", **entry):
    """A file with one tensor: float32 of shape [1], but for what is given."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}
    return lambda file: assemble(json.dumps({"x": entry}).encode(), data)


def _offsets(*pairs, data=b"\0" * 16):
    header = {
        f"t{i}": {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for i, (b, e) in enumerate(pairs)
    }
    return lambda file: assemble(json.dumps(header).encode(), data)


def _metadata(value):
    return lambda file: assemble(json.dumps({"__metadata__": value}).encode())


def _torch_save(file):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    return buffer.getvalue()


HEADER = [
    ("empty", lambda file: b"", "0 bytes is too short"),
    ("seven_bytes", lambda file: b"\0" * 7, "7 bytes is too short"),
    ("header_of_no_bytes", _u64(0, b""), "not JSON"),
    ("header_length_beyond_the_file", _u64(3), "header length 3 exceeds the file"),
    ("header_length_minus_one", _u64(2**64 - 1), "header length 18446744073709551615 exceeds"),
    ("header_length_minus_eight", _u64(2**64 - 8), "exceeds the file"),
    ("header_length_of_int64_minimum", _u64(2**63), "exceeds the file"),
    ("pickle", lambda file: pickle.dumps({"x": 1.0, "y": "z"}), "too short|exceeds the file"),
    ("torch_save", _torch_save, "exceeds the file"),
    ("not_utf8", _text(b'{"\xff": 1}'), "the header is not JSON"),
    ("utf16", _text('{"x": 1}'.encode("utf-16")), "the header is not JSON"),
    ("utf8_with_bom", _text(b"\xef\xbb\xbf{}"), "the header is not JSON"),
    ("not_json", _text(b"{]"), "the header is not JSON"),
    ("two_documents", _text(b"{} {}"), "the header is not JSON"),
    ("null", _text(b"null"), "the header is not a JSON object"),
    ("list", _text(b"[]"), "the header is not a JSON object"),
    ("string", _text(b'"x"'), "the header is not a JSON object"),
    ("nested_lists", _text(b"[" * 100_000), "the header is not JSON"),
    ("nested_objects", _text(b'{"a":' * 100_000), "the header is not JSON"),
    ("nested_dtype", _text(b'{"x":{"dtype":%s,"shape":[],"data_offsets":[]}}' % (b"[" * 300 + b"]" * 300)),
     "dtype"),
    ("same_tensor_twice", _text(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}'), "twice"),
    ("same_field_twice", _text(b'{"x":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
     "twice"),
    ("nan", _entry(shape=[float("nan")]), "NaN"),
    ("infinity", _entry(shape=[float("inf")]), "Infinity"),
    ("number_of_a_million_digits", _text(b'{"x":' + b"1" * 1_000_000 + b"}"), "the header is not JSON"),
    ("entry_is_a_list", _text(b'{"x":[1]}'), "'x': the entry is not"),
    ("entry_lacks_dtype", _text(b'{"x":{"shape":[0],"data_offsets":[0,0]}}'), "'x': the entry is not"),
    ("entry_has_a_fourth_field", _entry(strides=[1]), "'x': the entry is not"),
    ("dtype_unknown", _entry(dtype="F33"), "'x': dtype 'F33' is unknown"),
    ("dtype_is_a_number", _entry(dtype=32), "'x': dtype of type int"),
    ("dtype_long", _entry(dtype="F" * 100_000), "'x': dtype 'FFF"),
    ("name_long", _text(b'{"' + b"n" * 100_000 + b'":[]}'), "nnn.* the entry is not"),
    ("shape_is_a_number", _entry(shape=4), "'x': shape is not a list"),
    ("shape_has_a_bool", _entry(shape=[True]), "'x': shape is not a list"),
    ("shape_has_a_float", _entry(shape=[1.0]), "'x': shape is not a list"),
    ("shape_negative", _entry(shape=[-1]), "'x': shape is not a list"),
    ("shape_negative_twice", _entry(b"\0" * 4, shape=[-1, -1]), "'x': shape is not a list"),
    ("shape_of_rank_1000", _entry(b"\0" * 4, shape=[1] * 1000), "'x': shape is not a list of up to 64"),
    ("shape_of_huge_sizes", _entry(shape=[HUGE] * 64), "'x': shape is not a list"),
    ("shape_wraps_to_four_bytes", _entry(b"\0" * 4, shape=[2**62 + 1, 4]), "'x': shape is too large"),
    ("shape_wraps_to_nothing", _entry(shape=[2**32, 2**32], data_offsets=[0, 0]), "'x': shape is too large"),
    ("shape_empty_but_huge", _entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "'x': shape is too large"),
    ("shape_larger_than_the_file", _entry(shape=[2**40], data_offsets=[0, 2**42]),
     "end at byte .*the file at"),
    ("shape_and_offsets_differ", _entry(b"\0" * 8, data_offsets=[0, 8]), "make 4 bytes, data_offsets 8"),
    ("offsets_reversed", _entry(b"\0" * 4, data_offsets=[4, 0]), "make 4 bytes, data_offsets -4"),
    ("offsets_negative", _entry(b"\0" * 4, data_offsets=[-4, 0]), "'x': data_offsets are not two sizes"),
    ("offsets_are_bools", _entry(b"\0", dtype="U8", data_offsets=[False, True]),
     "data_offsets are not two sizes"),
    ("offsets_are_three", _entry(data_offsets=[0, 4, 4]), "'x': data_offsets are not two sizes"),
    ("offsets_are_huge", _entry(data_offsets=[HUGE, HUGE + 4]), "'x': data_offsets are not two sizes"),
    ("offsets_beyond_the_file", _entry(b"\0" * 4, data_offsets=[4, 8]), "hole or overlaps: it begins at"),
    ("offsets_overlap", _offsets((0, 9), (8, 16)), "'t1' leaves a hole or overlaps"),
    ("offsets_the_same", _offsets((0, 16), (0, 16)), "'t1' leaves a hole or overlaps"),
    ("offsets_leave_a_hole", _offsets((0, 7), (8, 16)), "'t1' leaves a hole or overlaps"),
    ("offsets_leave_the_start", _offsets((1, 16)), "'t0' leaves a hole or overlaps"),
    ("offsets_leave_the_end", _offsets((0, 15)), "the tensors end at byte .*the file at"),
    ("extended_by_a_byte", lambda file: file.build() + b"\0", "truncated or extended"),
    ("metadata_is_a_list", _metadata([]), "__metadata__ is not a map of strings"),
    ("metadata_holds_a_number", _metadata({"pyengine": 1}), "__metadata__ is not a map of strings"),
    ("metadata_holds_an_object", _metadata({"pyengine": {}}), "__metadata__ is not a map of strings"),
    ("no_metadata", _text(b"{}"), "no pyengine manifest"),
    ("no_manifest", _metadata({"format": "pt"}), "no pyengine manifest"),
    ("manifest_is_not_json", _metadata({"pyengine": "{"}), "the manifest is not JSON"),
    ("manifest_is_a_list", _metadata({"pyengine": "[]"}), "the manifest is not a JSON object"),
    ("manifest_is_nested", _metadata({"pyengine": "[" * 100_000}), "the manifest is not JSON"),
    ("manifest_names_a_key_twice", _metadata({"pyengine": '{"a":1,"a":1}'}), "twice"),
    ("manifest_holds_nan", _metadata({"pyengine": '{"version":NaN}'}), "NaN"),
    ("manifest_is_empty", _metadata({"pyengine": "{}"}), "manifest: version is not a list"),
    ("manifest_without_checksum", _metadata({"pyengine": '{"version":[1,0]}'}), "checksum of the manifest"),
]  # fmt: skip


def _set(*path_and_value):
    """Sets manifest[path...] = value."""
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


def _move(old, new):
    """Gives a layer another name."""

    def change(manifest):
        manifest["layers"][new] = manifest["layers"].pop(old)

    return change


def _nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


_WRONG_TYPES = [
    (f"{field}_is_{type(value).__name__}", _set(field, value), f"manifest: {field} is not")
    for field, wrong in {
        "version": (1, "1.0", None, {}),
        "library": (1, None, []),
        "recipe": ({}, "x", None),
        "layers": ([], "x", None, 1),
        "rest": (1, None, True),
        "aliases": ([], "x", None),
        "volatile": ({}, "ids", None),
        "edits": ({}, "x", None),
    }.items()
    for value in wrong
] + [
    (f"layer_{field}_is_{type(value).__name__}", _set("layers", "wide", field, value),
     f"'wide': {field} is not")
    for field, wrong in {
        "op": (1, None, []),
        "format": (8, None, ["int8"]),
        "input": (0, None, {}),
        "shape": ("7x8", None, {}, 56, [7], [7, 8, 1], [7.0, 8], [True, 8], [-7, -8], [2**48, 8], [HUGE, 8]),
        "dtype": (32, None),
        "crc32": (0, None),
    }.items()
    for value in wrong
]  # fmt: skip

MANIFEST = [
    *_WRONG_TYPES,
    ("version_of_one_number", _set("version", [1]), "version is not two sizes"),
    ("version_negative", _set("version", [-1, 0]), "version is not two sizes"),
    ("version_of_bools", _set("version", [True, False]), "version is not two sizes"),
    ("version_huge", _set("version", [HUGE, 0]), "version is not two sizes"),
    ("version_of_newer_major", _set("version", [2, 7]),
     "format version 2.7 needs a pyengine that reads major 2"),
    ("recipe_nested", _set("recipe", _nested(700)), "recipe is nested too deep"),
    ("edit_unknown", _set("edits", ["fold"]), "edit 'fold' is not known"),
    ("edit_nested", _set("edits", _nested(700)), "edit is not known"),
    ("layer_is_a_string", _set("layers", "wide", "int8"), "'wide': not an object"),
    ("op_unknown", _set("layers", "wide", "op", "conv9d"), "'wide': op 'conv9d' is unknown"),
    ("op_names_code", _set("layers", "wide", "op", "os.system"), "'wide': op 'os.system' is unknown"),
    ("op_of_the_other_kind", _set("layers", "odd", "op", "embedding"), "'odd' is embedding .*, Linear"),
    ("format_unknown", _set("layers", "wide", "format", "int9"), "'wide': unknown weight format 'int9'"),
    ("format_without_code", _set("layers", "wide", "format", "codebook4"), "'wide': unknown weight format"),
    ("format_that_cannot_be", _set("layers", "wide", "format", "int1"), "'wide': .*1 bits are not a format"),
    ("format_of_other_bits", _set("layers", "wide", "format", "int4"), "'wide': qdata has shape"),
    ("format_of_other_scale", _set("layers", "wide", "format", "int8_f16"), "'wide': scale is torch.float32"),
    ("format_without_its_zero", _set("layers", "wide", "format", "uint8"), "'wide.zero' is missing"),
    ("format_ternary", _set("layers", "wide", "format", "ternary"), "'wide': qdata has shape"),
    ("format_of_huge_digits", _set("layers", "wide", "format", "int8_g" + "9" * 100_000),
     "unknown weight format"),
    ("format_of_ten_digits", _set("layers", "wide", "format", "int8_g9999999999"), "unknown weight format"),
    ("group_size_huge", _set("layers", "odd", "format", "uint3_g999999999"), "'odd': scale has shape"),
    ("group_size_one", _set("layers", "odd", "format", "uint3_g1"), "'odd': scale has shape"),
    ("activations_unknown", _set("layers", "wide", "input", "a7"), "'wide': input 'a7' is unknown"),
    ("activations_of_an_embedding", _set("layers", "emb", "input", "a8"),
     "'emb': an embedding has no activations"),
    ("layer_dtype_unknown", _set("layers", "wide", "dtype", "int8"), "'wide': dtype 'int8' is unknown"),
    ("layer_dtype_names_code", _set("layers", "wide", "dtype", "__doc__"),
     "'wide': dtype '__doc__' is unknown"),
    ("shape_transposed", _set("layers", "wide", "shape", [8, 7]), r"'wide' is linear \(8, 7\) in the file"),
    ("shape_grown", _set("layers", "wide", "shape", [2**47, 8]), r"'wide' is linear \(140737488355328, 8\)"),
    ("shape_of_no_rows", _set("layers", "wide", "shape", [0, 8]), r"'wide' is linear \(0, 8\)"),
    ("crc_of_layer", _set("layers", "wide", "crc32", "00000000"), "'wide': its checksum does not match"),
    ("crc_of_rest", _set("rest", "00000000"), "checksum of the float tensors does not match"),
    ("padding_idx_beyond", _set("layers", "emb", "padding_idx", 5), "'emb': padding_idx is out of range"),
    ("padding_idx_negative", _set("layers", "emb", "padding_idx", -1), "'emb': padding_idx is out of range"),
    ("padding_idx_bool", _set("layers", "emb", "padding_idx", True), "'emb': padding_idx is not a int"),
    ("padding_idx_of_linear", _set("layers", "wide", "padding_idx", 1),
     "'wide': padding_idx is for embeddings"),
    ("alias_to_a_number", _set("aliases", {"also": 1}), "aliases are not all names"),
    ("alias_to_nothing", _set("aliases", "also", "nothing"),
     "'also' leads to 'nothing', which is not in the file"),
    ("alias_to_itself", _set("aliases", "also", "also"), "'also' leads to 'also', which is an alias itself"),
    ("alias_cycle", _set("aliases", {"also": "again", "again": "also"}), "which is an alias itself"),
    ("alias_chain", _set("aliases", {"also": "x", "x": "tied", "again": "odd"}), "which is an alias itself"),
    ("alias_of_a_tensor_to_a_layer", _set("aliases", "also", "odd"), "'also' .*the model has no such layer"),
    ("alias_of_a_layer_to_a_tensor", _set("aliases", "again", "tied"),
     "leads to 'tied'|'again' is packed|no place|missing"),
    ("alias_to_the_bytes_of_a_layer", _set("aliases", "also", "odd.qdata"), "'also' leads to 'odd.qdata'"),
    ("alias_is_a_tensor_too", _set("aliases", "norm.weight", "norm.bias"),
     "'norm.weight' is a tensor of its own"),
    ("alias_is_a_layer_too", _set("aliases", "wide", "odd"), "'wide' is a layer of its own"),
    ("alias_of_another_shape", _set("aliases", "also", "mask"), "'also' has shape"),
    ("alias_of_another_kind", _set("aliases", "again", "emb"), "'again' is embedding"),
    ("alias_without_a_place", _set("aliases", "more", "tied"),
     "'more' of the file has no place in the model"),
    ("alias_missing", _set("aliases", {"again": "odd"}), "'also' of the model is missing"),
    ("alias_of_layer_missing", _set("aliases", {"also": "tied"}),
     "'again' is packed in the model|'again.weight' of the model is missing"),
    ("volatile_holds_a_number", _set("volatile", [1]), "volatile are not all names"),
    ("volatile_names_nothing", _set("volatile", ["ids", "nothing"]), "volatile buffer 'nothing' is missing"),
    ("volatile_names_a_parameter", _set("volatile", ["ids", "tied"]),
     "'tied' is a volatile buffer, a parameter"),
    ("volatile_names_a_tied_parameter", _set("volatile", ["ids", "also"]),
     "'also' is a volatile buffer, a parameter"),
    ("layer_named_nothing", _move("wide", ""), "layer '': tensor 'qdata' is missing"),
    ("layer_in_no_module", _move("wide", "nowhere"), "'nowhere'"),
    ("layer_is_an_attribute", _move("wide", "__class__"), "'__class__'"),
    ("layer_is_an_attribute_of_a_module", _move("wide", "wide.__class__"), "'wide.__class__'"),
    ("layer_is_a_parameter", _move("wide", "wide.weight"), "'wide.weight'"),
    ("layer_is_a_norm", _move("wide", "norm"), "layer 'norm': tensor 'norm.qdata' is missing"),
    ("no_layers", _set("layers", {}), "leads to 'odd'|'emb' is packed in the model"),
    ("layer_within_a_layer", lambda m: m["layers"].update({"wide.x": m["layers"]["wide"]}), "'wide.x'"),
]  # fmt: skip


def _put(name, change, **kwargs):
    """Replaces the bytes of a tensor by change(bytes)."""
    return lambda file: file.put(name, change(file.tensor(name)), **kwargs)


def _byte(position, value):
    def change(content):
        content[position] = value
        return content

    return change


def _floats(kind, value):
    def change(content):
        content[: struct.calcsize(kind)] = struct.pack(kind, value)
        return content

    return change


def _rename(old, new):
    def change(file):
        file.header[new] = file.header.pop(old)
        file.seal()

    return change


def _same(content):
    return content


def _rename_layer(old, new):
    """A layer under another name, with its tensors."""

    def change(file):
        for name in [name for name in file.header if name.startswith(f"{old}.")]:
            part = name.removeprefix(f"{old}.")
            file.header[f"{new}.{part}" if new else part] = file.header.pop(name)
        manifest = file.manifest
        _move(old, new)(manifest)
        file.manifest = manifest
        file.seal()

    return change


TENSORS = [
    ("qdata_missing", lambda file: file.drop("wide.qdata"), "'wide': tensor 'wide.qdata' is missing"),
    ("scale_missing", lambda file: file.drop("wide.scale"), "'wide': tensor 'wide.scale' is missing"),
    ("zero_missing", lambda file: file.drop("odd.zero"), "'odd': tensor 'odd.zero' is missing"),
    ("bias_missing", lambda file: file.drop("wide.bias"), "'wide' .*without bias, the model's differs"),
    ("bias_surplus", lambda file: file.add("odd.bias", bytes(12), "F32", [3]),
     "'odd' .*with bias, the model's"),
    ("zero_surplus", lambda file: file.add("wide.zero", bytes(7), "U8", [7, 1]), "'wide.zero' .*no place"),
    ("bias_of_embedding", lambda file: file.add("emb.bias", bytes(20), "F32", [5]), "'emb.bias' .*no place"),
    ("float_missing", lambda file: file.drop("norm.weight"), "'norm.weight' of the model is missing"),
    ("float_surplus", lambda file: file.add("extra", bytes(4), "F32", [1]),
     "'extra' of the file has no place"),
    ("float_renamed", _rename("norm.bias", "norm.bios"), "'norm.bios' of the file has no place"),
    ("float_weight_beside_packed", lambda f: f.add("wide.weight", bytes(224), "F32", [7, 8]),
     "'wide.weight'"),
    ("float_of_other_shape", _put("norm.weight", _same, shape=[1, 3]), r"'norm.weight' has shape \(1, 3\)"),
    ("float_as_integer", _put("norm.weight", _same, dtype="I32"), "'norm.weight' is torch.int32"),
    ("integer_as_float", _put("ids", _same, dtype="F64"), "'ids' is torch.float64"),
    ("integer_as_unsigned", _put("ids", _same, dtype="U64"), "'ids' is torch.uint64"),
    ("bool_as_byte", _put("mask", _same, dtype="U8"), "'mask' is torch.uint8"),
    ("bool_of_two", _put("mask", _byte(0, 2)), "'mask' has bool values that are neither"),
    ("qdata_of_other_dtype", _put("wide.qdata", _same, dtype="I8"), "'wide': qdata is torch.int8"),
    ("qdata_transposed", _put("wide.qdata", _same, shape=[8, 7]), r"'wide': qdata has shape \(8, 7\)"),
    ("qdata_flat", _put("wide.qdata", _same, shape=[56]), r"'wide': qdata has shape \(56,\)"),
    ("qdata_short", _put("wide.qdata", lambda b: b[:48], shape=[6, 8]), r"'wide': qdata has shape \(6, 8\)"),
    ("qdata_empty", _put("wide.qdata", lambda b: b"", shape=[0, 8]), r"'wide': qdata has shape \(0, 8\)"),
    ("qdata_padding_bits", _put("odd.qdata", _byte(2, 0x20)), "'odd': the padding bits"),
    ("scale_nan", _put("wide.scale", _floats("<f", float("nan"))), "'wide': scale has values"),
    ("scale_infinite", _put("wide.scale", _floats("<f", float("inf"))), "'wide': scale has values"),
    ("scale_negative", _put("wide.scale", _floats("<f", -1.0)), "'wide': scale has values"),
    ("scale_half_nan", _put("odd.scale", _floats("<e", float("nan"))), "'odd': scale has values"),
    ("scale_as_integer", _put("wide.scale", _same, dtype="I32"), "'wide': scale is torch.int32"),
    ("scale_as_bfloat16", _put("odd.scale", _same, dtype="BF16"), "'odd': scale is torch.bfloat16"),
    ("scale_flat", _put("wide.scale", _same, shape=[7]), "'wide': scale has shape"),
    ("zero_above_codes", _put("odd.zero", _byte(0, 8)), "'odd': zero points lie above the largest code, 7"),
    ("bias_of_other_shape", _put("wide.bias", _same, shape=[7, 1]), "'wide': bias is"),
    ("bias_as_integer", _put("wide.bias", _same, dtype="I32"), "'wide': bias is torch.int32"),
    ("layer_renamed", _rename_layer("wide", "nowhere"), "'nowhere' .*the model has no such layer"),
    ("layer_named_nothing", _rename_layer("wide", ""), "'' .*the model has no such layer"),
    ("layer_is_an_attribute", _rename_layer("wide", "__class__"), "'__class__' .*no such layer"),
    ("layer_is_an_attribute_of_a_module", _rename_layer("odd", "wide.__class__"),
     "'wide.__class__' .*no such layer"),
    ("layer_is_a_parameter", _rename_layer("wide", "tied"), "'tied' .*the model has no such layer"),
    ("layer_within_a_layer", _rename_layer("odd", "wide.odd"), "'wide.odd' .*the model has no such layer"),
    ("layer_with_a_newline", _rename_layer("wide", "wide\nOK"), r"'wide\\nOK' .*the model has no such layer"),
]  # fmt: skip


def _changed_manifest(change):
    def build(file):
        manifest = file.manifest
        change(manifest)
        file.manifest = manifest
        return file.build()

    return build


def _changed(change):
    def build(file):
        change(file)
        return file.build()

    return build


def _numbered(rows):
    """Rows of one name get numbers, so that each name leads to one row."""
    seen = {}
    for name, build, problem in rows:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}_{seen[name]}"), build, problem


ATTACKS = list(
    _numbered(
        [
            *HEADER,
            *((f"manifest_{name}", _changed_manifest(change), problem) for name, change, problem in MANIFEST),
            *((f"tensors_{name}", _changed(change), problem) for name, change, problem in TENSORS),
        ]
    )
)
