"""Tensors of every kind go in, and the same kind comes out; nothing of the caller's is written."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.reduce import Exchange, FrameRefused, Layout, LayoutError, MisuseError, Result, Vector
from collectives.reduce.layout import chunk_elements_for

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def run(tools, tensors, codec="fp32", **kwargs):
    before = {name: [t.clone() for t in list_] for name, list_ in tensors.items()}
    mesh = tools.Mesh(tensors, tools.declare(list(tensors), codec=codec), seed=3, **kwargs)
    mesh.run()
    for name, node in mesh.nodes.items():
        assert node.done
        for given_, was in zip(tensors[name], before[name], strict=True):
            assert torch.equal(given_, was)
    nodes = list(mesh.nodes.values())
    assert len({node.digest for node in nodes}) == 1
    for node in nodes[1:]:
        for a, b in zip(node.result.tensors, nodes[0].result.tensors, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    return nodes[0].result.tensors


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, torch.bool, torch.complex64])
def test_every_dtype_is_averaged_into_itself(tools, dtype, codec):
    generator = torch.Generator().manual_seed(1)
    raw = {name: torch.randn(3, 1501, generator=generator) * 20 for name in "abc"}
    if dtype in INTS:
        raw = {name: value.abs() for name, value in raw.items()}
    tensors = {name: [value.to(dtype), value[:, :2].to(dtype)] for name, value in raw.items()}
    out = run(tools, tensors, codec)
    assert [t.dtype for t in out] == [dtype, dtype]
    wide = torch.complex128 if dtype == torch.complex64 else torch.float64
    mean = torch.stack([t[0].to(wide) for t in tensors.values()]).mean(0)
    if dtype == torch.bool:
        assert torch.equal(out[0], mean.real >= 0.5)
        return
    tolerance = {"fp32": 1e-5, "bf16": 0.5, "int8": 0.9}[codec]
    tolerance += {torch.float16: 0.03, torch.bfloat16: 0.3}.get(dtype, 0.0) + (0.51 if dtype in INTS else 0)
    assert float((out[0].to(wide) - mean).abs().max()) <= tolerance


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])
def test_the_largest_integers_neither_wrap_nor_diverge(tools, value):
    dtype = torch.int32 if abs(value) <= 2**31 else torch.int64
    out = run(tools, {name: [torch.full((5000,), value, dtype=dtype)] for name in "ab"})
    assert float((out[0].double() / value - 1).abs().max()) < 1e-6


def awkward():
    base = torch.randn(40, 30, 20)
    return [
        base,
        base.t() if base.dim() == 2 else base.permute(2, 0, 1),
        base[::2, :, 1::3],
        torch.randn(5000)[::3],
        torch.randn(1).expand(700),
        torch.randn(7, 1).expand(7, 300),
        torch.tensor(3.5),
        torch.zeros(0, 5),
        torch.empty(0),
        torch.randn(60, 50).bfloat16().t(),
        torch.nn.Parameter(torch.randn(50, 3)),
        torch.randn(12, 10, dtype=torch.complex64).conj(),
        torch.randn(3, 50_000).half()[:, ::2],
        torch.randn(200, 400).bfloat16().t(),
    ]


def test_strides_views_scalars_parameters_and_empty_tensors(tools):
    torch.manual_seed(2)
    tensors = {name: awkward() for name in "abc"}
    out = run(tools, tensors)
    for index, result in enumerate(out):
        parts = [tensors[name][index].detach() for name in tensors]
        assert result.shape == parts[0].shape
        assert result.is_contiguous()
        wide = torch.stack([p.to(torch.complex128 if p.is_complex() else torch.float64) for p in parts])
        if result.numel():
            tolerance = {torch.bfloat16: 0.02, torch.float16: 0.002}.get(result.dtype, 1e-6)
            assert float((result.to(wide.dtype) - wide.mean(0)).abs().max()) < tolerance


@pytest.mark.parametrize(
    "tensors", [[], [torch.empty(0)], [torch.zeros(0, 3), torch.empty(0, dtype=torch.int64)]]
)
@pytest.mark.parametrize("codec", ["fp32", "topk"])
def test_nothing_to_reduce_is_done_at_once(tools, tensors, codec):
    out = run(tools, {name: list(tensors) for name in "ab"}, codec)
    assert [t.shape for t in out] == [t.shape for t in tensors]


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_ranges_are_read_as_the_flat_copy_would_be(shapes, order, data):
    tensors = []
    for shape in shapes:
        tensor = (
            torch.arange(int(np.prod(shape, dtype=int)), dtype=torch.float32).view(shape)
            + len(tensors) * 1000
        )
        axes = list(range(len(shape)))
        order.shuffle(axes)
        tensors.append(tensor.permute(axes))
    layout = Layout.of(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.empty(0)
    vector = Vector(layout, tensors)
    start = data.draw(st.integers(0, layout.elements))
    end = data.draw(st.integers(start, layout.elements))
    assert vector.read(start, end).tolist() == flat[start:end].tolist()
    out = Vector(layout, layout.empty())
    out.write(0, flat.numpy())
    assert out.read(0, layout.elements).tolist() == flat.tolist()


def test_layouts_differ_with_shapes_dtypes_and_chunks_and_with_nothing_else():
    one = Layout.of([torch.zeros(3, 4), torch.zeros(2)])
    assert one.digest == Layout.of([torch.ones(4, 3).t(), torch.ones(2)]).digest
    others = [
        [torch.zeros(4, 3), torch.zeros(2)],
        [torch.zeros(3, 4), torch.zeros(2).half()],
        [torch.zeros(2), torch.zeros(3, 4)],
    ]
    assert one.digest not in {Layout.of(tensors).digest for tensors in others}
    assert Layout.of([torch.zeros(3, 4), torch.zeros(2)], 2048).digest != one.digest
    assert one.digest.hex() == "24184109f94e933b829b5e9bb73bed09538f2ed5dffb4bc966584298bbdd2f25"


@pytest.mark.parametrize("elements", [0, 1, 4095, 4096, 4097, 10**6, 16 * 2**20, 10**9, 10**11])
def test_chunks_cover_everything_once_and_are_neither_too_many_nor_too_large(elements):
    size = chunk_elements_for(elements)
    chunks = -(-elements // size)
    assert size % 1024 == 0
    assert chunks <= 16384
    assert 4096 <= size <= 524288 or chunks > 8192
    assert elements < 300_000 or chunks >= 32
    assert not 300_000 <= elements <= 10**6 or chunks >= 60


def test_what_cannot_be_reduced_is_refused_by_name():
    with pytest.raises(LayoutError, match="tensor 1"):
        Layout.of([torch.zeros(2), torch.zeros(3, 3).to_sparse()])
    with pytest.raises(LayoutError, match="meta"):
        Layout.of([torch.zeros(2, device="meta")])
    layout = Layout.of([torch.zeros(2)])
    with pytest.raises(LayoutError, match="do not have the layout"):
        Vector(layout, [torch.zeros(3)])
    with pytest.raises(LayoutError, match="multiple of 1024"):
        Layout.of([torch.zeros(2)], 1000)
    with pytest.raises(MisuseError, match="contiguous"):
        Result(Layout.of([torch.zeros(3, 2)]), out=[torch.zeros(2, 3).t()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_who_missed_a_result_gets_it_chunk_by_chunk_from_anybody(tools, dtype):
    tensors = {name: [torch.randn(100, 99).mul(50).to(dtype), torch.randn(9000).to(dtype)] for name in "ab"}
    mesh = tools.Mesh(tensors, tools.declare(list("ab"), codec="int8"))
    mesh.run()
    source = mesh.nodes["a"].result
    late = Result(source.layout, tensors["a"])
    with pytest.raises(MisuseError, match="missing"):
        _ = late.digest
    with pytest.raises(FrameRefused):
        late.check_hashes("b", source.hashes[:-1], source.digest)
    with pytest.raises(FrameRefused):
        late.check_hashes("b", bytes(len(source.hashes)), source.digest)
    hashes = late.check_hashes("b", source.hashes, source.digest)
    for chunk in reversed(range(source.layout.chunks)):
        data = bytearray(b"".join(bytes(part) for part in source.payload(chunk)))
        assert len(data) == source.payload_bytes(chunk)
        for spoilt in (data[:-1], bytes([data[0] ^ 1]) + data[1:]):
            with pytest.raises(FrameRefused):
                late.accept("b", chunk, memoryview(bytes(spoilt)), hashes)
        late.accept("b", chunk, memoryview(data), hashes)
    with pytest.raises(FrameRefused):
        late.accept("b", source.layout.chunks, memoryview(b""), hashes)
    assert late.digest == source.digest
    assert all(torch.equal(a, b) for a, b in zip(late.tensors, source.tensors, strict=True))


def test_results_may_go_into_tensors_that_are_given(tools):
    out = [torch.zeros(100, 3)]
    node = Exchange("a", [torch.ones(100, 3)], tools.declare(["a"]), out=out)
    assert node.done
    assert node.result.tensors[0] is out[0]
    assert out[0].sum() == 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_tensors_on_a_gpu_are_reduced_and_their_results_are_there(tools, codec):
    torch.manual_seed(4)
    host = {name: [torch.randn(300, 99).t(), torch.randn(70_000).bfloat16()] for name in "ab"}
    wanted = run(tools, host, codec)
    got = run(tools, {name: [t.cuda() for t in tensors] for name, tensors in host.items()}, codec)
    for here, there in zip(wanted, got, strict=True):
        assert there.is_cuda
        assert torch.equal(here, there.cpu())
