"""Safetensors headers and indexes: what is read, byte ranges of spans, and every way a file can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards import (
    CheckpointError,
    CheckpointIndex,
    Engine,
    LocalFault,
    header_range,
    load_span,
    shape_of,
)
from model_shards.safetensors_header import HEADER_BYTES_MAX, coalesce, parse_header, read_header


def pack(entries, data=b"", *, length=None):
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(body) if length is None else length).to_bytes(8, "little") + body + data


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(make_reference):
    return make_reference("qwen2", shard_bytes=20_000)


@pytest.fixture
def copied(llama, tmp_path):
    """A private copy of a checkpoint, to be damaged."""
    return shutil.copytree(llama.directory, tmp_path / "model")


def test_header_of_a_good_file_gives_places_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        pack({"b": entry(4, 6), "a": entry(0, 4, [2, 2]), "__metadata__": {"x": "y"}}, b"abcdef")
    )
    header = read_header(path)
    assert set(header.tensors) == {"a", "b"}
    raw = path.read_bytes()
    assert raw[header.tensors["b"].start : header.tensors["b"].end] == b"ef"
    assert header.file_bytes == len(raw)


BAD_HEADERS = {
    "empty": b"",
    "seven_bytes": b"1234567",
    "length_zero": pack(b""),
    "length_huge": pack({}, length=1 << 63),
    "length_over_the_ceiling": pack({}, length=HEADER_BYTES_MAX + 1),
    "length_beyond_the_file": pack({}, length=50),
    "not_json": pack(b"{'a': 1}"),
    "not_utf8": pack(b'{"\xff": 1}'),
    "not_an_object": pack(b"[1, 2]"),
    "deeply_nested": pack(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "duplicate_tensor": pack(
        b'{"a":%s,"a":%s}' % (json.dumps(entry(0, 2)).encode(), json.dumps(entry(2, 4)).encode())
    ),
    "duplicate_empty_tensor": pack(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 0)).encode(),) * 2)),
    "duplicate_field": pack(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "entry_is_a_number": pack({"a": 5}),
    "extra_field": pack({"a": {**entry(0, 2), "x": 1}}),
    "missing_field": pack({"a": {"dtype": "U8", "shape": [2]}}),
    "unknown_dtype": pack({"a": entry(0, 2, dtype="Q3")}),
    "dtype_is_a_number": pack({"a": {**entry(0, 2), "dtype": 7}}),
    "negative_shape": pack({"a": entry(0, 2, [-2])}),
    "shape_of_floats": pack({"a": entry(0, 2, [2.0])}),
    "shape_of_booleans": pack({"a": entry(0, 1, [True])}),
    "too_many_dimensions": pack({"a": entry(0, 1, [1] * 9)}),
    "shape_overflows": pack({"a": entry(0, 2, [1 << 60, 1 << 60])}),
    "size_contradicts_shape": pack({"a": entry(0, 2, [3])}),
    "offsets_backwards": pack({"a": {"dtype": "U8", "shape": [0], "data_offsets": [2, 0]}}),
    "offsets_three": pack({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1, 2]}}),
    "overlap": pack({"a": entry(0, 4), "b": entry(2, 6)}),
    "hole": pack({"a": entry(0, 4), "b": entry(5, 6)}),
    "hole_at_the_start": pack({"a": entry(1, 4)}),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused_naming_the_file(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_HEADERS[name])
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(tmp_path)
    assert caught.value.file == "model.safetensors"
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_parse_or_raise_the_checkpoint_error(body):
    try:
        parse_header(body, "f")
    except CheckpointError:
        pass


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F32", "nope", 3]),
                "shape": st.lists(st.integers(-1, 5) | st.none(), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 60), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    )
)
def test_any_entries_parse_or_raise_and_parsed_ones_tile_the_data(entries):
    body = json.dumps(entries).encode()
    try:
        header = parse_header(body, "f")
    except CheckpointError:
        return
    covered = sum(info.end - info.start for info in header.tensors.values())
    assert header.file_bytes == header.bytes_end + covered


def test_header_range_comes_from_the_first_eight_bytes():
    assert header_range((100).to_bytes(8, "little")) == (0, 108)


@pytest.mark.parametrize("first", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8])
def test_header_range_refuses_nonsense(first):
    with pytest.raises(CheckpointError):
        header_range(first)


def test_coalesce_joins_ranges_that_touch():
    assert coalesce([(5, 7), (0, 2), (2, 4), (6, 9), (9, 9)]) == [(0, 4), (5, 9)]


def test_the_directory_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CheckpointIndex.open(tmp_path)


def test_a_sharded_checkpoint_has_one_index_over_its_files(sharded):
    index = CheckpointIndex.open(sharded.directory)
    assert len(index.files()) > 2
    index.check(sharded.config)
    assert set(index.names()) == set(sharded.model.state_dict())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "plain file name"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "plain file name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "missing"),
    ],
)
def test_a_bad_index_file_is_refused(tmp_path, text, what):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=what):
        CheckpointIndex.open(tmp_path)


def test_an_index_that_places_a_tensor_in_the_wrong_file_is_refused(sharded, tmp_path):
    directory = shutil.copytree(sharded.directory, tmp_path / "model")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(directory)
    assert (caught.value.file, caught.value.tensor) == (files[1], name)


def edit_header(directory, change):
    """Rewrites the header of model.safetensors by ``change(entries)`` and leaves the data as it is."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:end])
    change(entries)
    path.write_bytes(pack(entries, raw[end:]))


def test_a_truncated_file_is_refused_with_both_sizes(copied, llama):
    path = copied / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 100)
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(copied).check(llama.config)
    assert str(size) in str(caught.value)
    assert str(size - 100) in str(caught.value)


def test_loading_from_a_truncated_file_names_the_tensor(copied, llama):
    index = CheckpointIndex.open(copied)
    path = copied / "model.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_span(copied, index, llama.config, 0, 4)
    assert caught.value.tensor is not None


def test_bytes_after_the_last_tensor_are_refused(copied, llama):
    with (copied / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="after its last tensor"):
        CheckpointIndex.open(copied).check(llama.config)


def test_a_missing_tensor_is_named(copied, llama):
    def rename(entries):
        entries["other"] = entries.pop("model.layers.2.mlp.up_proj.weight")

    edit_header(copied, rename)
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(copied).check(llama.config)
    assert caught.value.tensor == "model.layers.2.mlp.up_proj.weight"


def test_a_wrong_shape_is_named_with_both_shapes(copied, llama):
    def transpose(entries):
        entries["model.layers.1.mlp.down_proj.weight"]["shape"].reverse()

    edit_header(copied, transpose)
    index = CheckpointIndex.open(copied)
    with pytest.raises(CheckpointError) as caught:
        index.check(llama.config)
    assert caught.value.tensor == "model.layers.1.mlp.down_proj.weight"
    assert "[48, 32]" in str(caught.value)
    assert "[32, 48]" in str(caught.value)
    with pytest.raises(CheckpointError):
        load_span(copied, index, llama.config, 1, 2)
    load_span(copied, index, llama.config, 2, 3)


def test_a_wrong_dtype_is_named(copied, llama):
    def to_integers(entries):
        entries["model.norm.weight"]["dtype"] = "I32"

    edit_header(copied, to_integers)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*I32.*BF16"):
        CheckpointIndex.open(copied).check(llama.config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_tensor(copied, llama, value):
    index = CheckpointIndex.open(copied)
    info = index.tensor("model.layers.3.self_attn.k_proj.weight")
    with (copied / "model.safetensors").open("r+b") as stream:
        stream.seek(info.end - 4)
        stream.write(bytes(torch.tensor([value]).view(torch.uint8).tolist()))
    with pytest.raises(CheckpointError, match="finite") as caught:
        load_span(copied, index, llama.config, 3, 4)
    assert caught.value.tensor == "model.layers.3.self_attn.k_proj.weight"
    load_span(copied, index, llama.config, 0, 3)


def test_a_value_beyond_float16_is_refused_when_that_dtype_is_asked_for(copied, llama):
    index = CheckpointIndex.open(copied)
    info = index.tensor("lm_head.weight")
    with (copied / "model.safetensors").open("r+b") as stream:
        stream.seek(info.start)
        stream.write(bytes(torch.tensor([1e6]).view(torch.uint8).tolist()))
    load_span(copied, index, llama.config, 3, 4, dtype="bfloat16")
    with pytest.raises(CheckpointError, match="float16"):
        load_span(copied, index, llama.config, 3, 4, dtype="float16")


def all_spans(layers):
    return [(a, b) for a in range(layers) for b in range(a + 1, layers + 1)]


@pytest.mark.parametrize("span", all_spans(4))
@pytest.mark.parametrize("model", ["llama", "sharded", "tied"])
def test_a_span_loads_from_sparse_files_that_hold_only_its_ranges(
    model, span, llama, sharded, make_reference, tmp_path
):
    tied = make_reference("llama", tie_word_embeddings=True)
    reference = {"llama": llama, "sharded": sharded, "tied": tied}[model]
    config = reference.config
    full = CheckpointIndex.open(reference.directory)
    ranges = full.span_ranges(config, *span)
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        if (reference.directory / name).exists():
            shutil.copy(reference.directory / name, sparse)
    for file in full.files():
        raw = (reference.directory / file).read_bytes()
        kept = bytearray(
            b"\xff" * len(raw)
        )  # as floats: not a number, so reading one byte too many would fail
        for start, end in [(0, full.header_bytes(file)), *ranges.get(file, [])]:
            kept[start:end] = raw[start:end]
        (sparse / file).write_bytes(kept)
    index = CheckpointIndex.open(sparse)
    index.check(config)
    found = load_span(sparse, index, config, *span, dtype="float32")
    whole = load_span(reference.directory, full, config, *span, dtype="float32")
    for ours, theirs in zip(found.layers, whole.layers, strict=True):
        assert all(
            torch.equal(a.weight, b.weight) for a, b in zip(ours.linears(), theirs.linears(), strict=True)
        )
    wanted = sum(end - start for parts in ranges.values() for start, end in parts)
    assert found.bytes_read == wanted
    assert coalesce([(start, end) for _, start, end in found.ranges_read]) == coalesce(
        [part for parts in ranges.values() for part in parts]
    )


def test_spans_of_one_split_read_every_byte_once_and_nothing_else(llama):
    index, config = CheckpointIndex.open(llama.directory), llama.config
    read = [
        piece
        for start, end in [(0, 1), (1, 3), (3, 4)]
        for piece in load_span(llama.directory, index, config, start, end).ranges_read
    ]
    size = (llama.directory / "model.safetensors").stat().st_size
    assert sorted((a, b) for _, a, b in read)[0][0] == index.header_bytes("model.safetensors")
    assert sum(b - a for _, a, b in read) == size - index.header_bytes("model.safetensors")


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_a_span_outside_the_model_is_our_own_fault(llama, span):
    index = CheckpointIndex.open(llama.directory)
    with pytest.raises(LocalFault, match="span"):
        index.span_ranges(llama.config, *span)
    with pytest.raises(LocalFault, match="span"):
        load_span(llama.directory, index, llama.config, *span)


@pytest.mark.parametrize("model", ["llama", "sharded"])
def test_cuts_make_every_span_a_whole_number_of_pieces(model, llama, sharded):
    reference = {"llama": llama, "sharded": sharded}[model]
    index, config = CheckpointIndex.open(reference.directory), reference.config
    cuts = index.cuts()
    for file in index.files():
        assert cuts[file][0] == index.header_bytes(file)
        assert cuts[file] == sorted(set(cuts[file]))
        assert cuts[file][-1] < (reference.directory / file).stat().st_size
    for span in all_spans(4):
        for file, ranges in index.span_ranges(config, *span).items():
            edges = {*cuts[file], (reference.directory / file).stat().st_size}
            assert all(start in edges and end in edges for start, end in ranges)


def test_cuts_do_not_split_a_layer(llama):
    index = CheckpointIndex.open(llama.directory)
    cuts = index.cuts()["model.safetensors"]
    assert len(cuts) <= 2 * llama.config.layers + 4


def test_progress_reaches_the_total_and_may_end_the_load(llama):
    index, seen = CheckpointIndex.open(llama.directory), []
    span = load_span(
        llama.directory, index, llama.config, 0, 2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (span.bytes_read, span.bytes_read)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    class Cancelled(Exception):
        pass

    def refuse(done, total):
        raise Cancelled

    with pytest.raises(Cancelled):
        load_span(llama.directory, index, llama.config, 0, 2, progress=refuse)


@pytest.mark.parametrize("tied", [False, True])
def test_shape_of_counts_what_serving_will_hold(make_reference, tied):
    reference = make_reference("qwen3", head_dim=16, tie_word_embeddings=tied)
    index, config = CheckpointIndex.open(reference.directory), reference.config
    shape = shape_of(config, index, "bfloat16")
    state = reference.model.state_dict()
    layer = sum(value.numel() for name, value in state.items() if name.startswith("model.layers.0."))
    assert set(shape) == {
        "layers", "layer_bytes", "embed_bytes", "head_bytes", "tied", "layer_flops_per_token", "hidden_bytes",
        "kv_bytes_per_token_per_layer", "experts", "experts_per_token", "expert_bytes",
    }  # fmt: skip
    assert (shape["experts"], shape["experts_per_token"], shape["expert_bytes"]) == (0, 0, 0)
    assert shape["layers"] == 4
    assert shape["layer_bytes"] == 2 * layer
    assert shape["embed_bytes"] == 2 * 97 * 32
    assert shape["head_bytes"] == 2 * (97 * 32 + 32)
    assert shape["tied"] is tied
    assert shape["layer_flops_per_token"] == 2.0 * layer
    assert shape["hidden_bytes"] == 64
    assert shape["kv_bytes_per_token_per_layer"] == 2 * 2 * 16 * 2
    assert shape_of(config, index, "float32")["layer_bytes"] == 4 * layer


def test_shape_of_a_mixture_counts_all_experts_as_bytes_and_the_chosen_as_work(make_reference):
    reference = make_reference("mixtral", num_local_experts=5, num_experts_per_tok=2)
    shape = shape_of(reference.config, CheckpointIndex.open(reference.directory), "bfloat16")
    expert = 3 * 32 * 48
    assert (shape["experts"], shape["experts_per_token"], shape["expert_bytes"]) == (5, 2, 2 * expert)
    assert shape["layer_bytes"] / 2 - shape["layer_flops_per_token"] / 2 == 3 * expert


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_shape_of_latent_attention_caches_the_latent_and_counts_the_widest_layer(make_reference, quant):
    reference = make_reference(
        "deepseek_v3",
        kv_lora_rank=12, qk_nope_head_dim=4, qk_rope_head_dim=8, v_head_dim=4, q_lora_rank=10, n_routed_experts=4,
        num_experts_per_tok=1, moe_intermediate_size=24, first_k_dense_replace=1, n_shared_experts=2, n_group=1,
        topk_group=1, num_key_value_heads=4,
    )  # fmt: skip
    index = CheckpointIndex.open(reference.directory)
    shape = shape_of(reference.config, index, "bfloat16", quant)
    assert shape["kv_bytes_per_token_per_layer"] == 2 * (12 + 8)
    state = reference.model.state_dict()
    sparse = sum(value.numel() for name, value in state.items() if name.startswith("model.layers.1."))
    assert shape["layer_flops_per_token"] == 2.0 * (sparse - 3 * 3 * 24 * 32)
    span = load_span(reference.directory, index, reference.config, 1, 2, quant=quant)
    norms_and_correction = 2 * (32 + 32 + 12 + 10) + 4 * 4
    assert span.weight_bytes == shape["layer_bytes"] - norms_and_correction
    engine = Engine(span, kv_bytes_max=1 << 20)
    engine.open("s", 1, 2, 16)
    assert engine.kv_bytes_used() == 16 * shape["kv_bytes_per_token_per_layer"]
