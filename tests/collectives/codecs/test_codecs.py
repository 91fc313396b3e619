"""Every codec: its bytes, its stated error, hard values, hostile bytes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import collectives.codecs as face
from collectives.codecs import CodecFault, UnknownCodec, codec, codecs, register
from collectives.errors import NonFinite

torch.set_num_threads(1)

LENGTHS = [0, 1, 2, 3, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, 28672, 28673, 100_003]
LOSSY = [name for name in codecs() if name not in ("fp32", "bf16")]


def roundtrip(name, values):
    made = codec(name)
    data = bytearray(made.encode(values))
    return data, made.decode(memoryview(data), len(values))


def error(values, back):
    return float((back.double() - values.double()).norm() / values.double().norm())


def draw(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n) if kind == "gauss" else rng.standard_t(3, n)
    return torch.from_numpy(values.astype(np.float32))


def test_the_face_is_pinned():
    classes = {"BF16", "FP32", "INT4", "INT8", "SPARSE8", "TOPK", "Codec", "CodecFault", "UnknownCodec"}
    assert set(face.__all__) == classes | {"codec", "codecs", "register"}
    assert codecs() == ("bf16", "fp32", "int4", "int8", "sparse8", "topk")


def test_unknown_and_doubled_names_are_told():
    with pytest.raises(UnknownCodec, match="fp32"):
        codec("fp31")
    with pytest.raises(ValueError, match="already"):
        register(type(codec("fp32"))())


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize("n", LENGTHS)
def test_bytes_are_as_stated_and_lengths_of_all_kinds_come_back(name, n):
    values = draw("gauss", n)
    before = values.clone()
    data, back = roundtrip(name, values)
    made = codec(name)
    assert len(data) == made.bytes_for(n) if made.fixed else len(data) <= made.bytes_for(n)
    assert back.shape == (n,)
    assert back.dtype == torch.float32
    assert torch.equal(values, before)
    if n > 1000:
        assert error(values, back) <= made.relative_error * 1.05
    out = torch.full((n,), 7.0)
    assert torch.equal(made.decode(bytes(data), n, out), back)
    assert out is made.decode(bytes(data), n, out)


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize(("kind", "attribute"), [("gauss", "relative_error"), ("t3", "heavy_error")])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 3e7, 1e30])
def test_the_error_is_as_stated_and_not_much_less(name, kind, attribute, scale):
    values = draw(kind, 200_000) * scale
    stated = getattr(codec(name), attribute)
    measured = error(values, roundtrip(name, values)[1])
    assert stated * 0.5 <= measured <= stated


@pytest.mark.parametrize("name", codecs())
def test_encoding_is_a_function_of_the_values_alone(name):
    values = draw("t3", 70_000)
    first = bytes(codec(name).encode(values))
    assert bytes(codec(name).encode(values.clone())) == first
    odd = torch.empty(70_001)[1:]
    odd.copy_(values)
    assert bytes(codec(name).encode(odd)) == first


@pytest.mark.parametrize("name", [name for name in codecs() if codec(name).stable])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_stable_codecs_give_the_same_bytes_again_also_through_other_dtypes(name, dtype):
    values = torch.cat([draw("t3", 5000), draw("gauss", 5000) * 1e-6, draw("gauss", 100) * 1e6])
    made = codec(name)
    once = made.decode(bytearray(made.encode(values)), len(values)).to(dtype).float()
    twice = made.decode(bytearray(made.encode(once)), len(values))
    assert torch.equal(twice, once)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 100, 4096, 5000])
def test_what_cannot_carry_nan_and_infinity_refuses_them(name, bad, where):
    values = draw("gauss", 5001)
    values[where] = bad
    with pytest.raises(NonFinite):
        codec(name).encode(values)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_can_carry_nan_and_infinity_does(name):
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    back = roundtrip(name, values)[1]
    assert torch.equal(back.isnan(), values.isnan())
    assert torch.equal(back[1:], values[1:])


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.7, 1e-30, 3.38e38, -3.4028234e38])
@pytest.mark.parametrize("n", [1, 100, 4096, 10_000])
def test_constants_come_back_within_the_stated_error(name, value, n):
    if name == "bf16" and value < -3.39e38:
        value = -3.38e38  # what bf16 has no room for rounds to infinity, as in any conversion
    values = torch.full((n,), value)
    back = roundtrip(name, values)[1]
    if name == "topk":
        kept = back != 0
        assert int(kept.sum()) == (0 if value == 0 else sum(min(128, n - at) for at in range(0, n, 4096)))
        values, back = values[kept], back[kept]
    assert torch.isfinite(back).all()
    tolerance = {"bf16": 2**-8, "int4": 2**-6}.get(name, 1e-5)
    assert torch.allclose(back, values, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", LOSSY)
def test_denormals_become_zero_or_stay_and_never_become_nan(name):
    values = torch.full((5000,), 1e-42)
    values[7] = 1e-36
    back = roundtrip(name, values)[1]
    assert torch.isfinite(back).all()
    assert float(back.abs().max()) <= 2e-36


def test_one_huge_value_spoils_its_block_alone():
    values = draw("gauss", 4096)
    values[300] = 1e6
    for name, block in (("int8", 256), ("int4", 32)):
        back = roundtrip(name, values)[1]
        start = 300 // block * block
        outside = torch.cat([values[:start] - back[:start], values[start + block :] - back[start + block :]])
        assert float(outside.abs().max()) < 0.5
        assert float(back[300]) == pytest.approx(1e6, rel=0.005)


def test_topk_keeps_the_largest_of_each_block_with_their_signs():
    values = draw("t3", 3 * 4096 + 50)
    back = roundtrip("topk", values)[1]
    for start in range(0, len(values), 4096):
        part, got = values[start : start + 4096], back[start : start + 4096]
        chosen = set(torch.topk(part.abs(), min(128, len(part))).indices.tolist())
        assert set(torch.nonzero(got).view(-1).tolist()) == chosen
        index = torch.tensor(sorted(chosen))
        assert torch.equal(part[index].sign(), got[index].sign())
        assert len(got[index].abs().unique()) <= 2


@given(
    hnp.arrays(
        np.float32,
        st.integers(0, 600),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_finite_values_are_within_a_blocks_resolution(array):
    values = torch.from_numpy(array)
    for name, levels, block in (("int8", 127, 256), ("int4", 7, 32)):
        back = roundtrip(name, values)[1]
        for start in range(0, len(array), block):
            part = values[start : start + block]
            largest = float(part.abs().max())
            assert float((back[start : start + block] - part).abs().max()) <= largest / levels * 0.53 + 1e-34


@given(st.sampled_from(codecs()), st.integers(0, 9000), st.binary(max_size=400), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_to_n_values_or_a_codec_fault(name, n, data, padded):
    made = codec(name)
    if padded:
        data = (
            (data * (made.bytes_for(n) // max(1, len(data)) + 1))[: made.bytes_for(n)]
            if data
            else bytes(made.bytes_for(n))
        )
    try:
        assert made.decode(data, n).shape == (n,)
    except CodecFault:
        pass


@pytest.mark.parametrize("name", codecs())
@pytest.mark.parametrize("change", [-1, 1, 4, -4])
def test_truncated_and_lengthened_bytes_are_refused(name, change):
    data = bytes(codec(name).encode(draw("gauss", 5000)))
    data = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(CodecFault):
        codec(name).decode(data, 5000)


@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
@pytest.mark.parametrize("bits", [0xFF, 0x80])
def test_scales_that_are_no_magnitudes_are_refused(name, bits):
    data = bytearray(codec(name).encode(draw("gauss", 5000)))
    start = 4 if name == "topk" else 0
    width = 2 if name == "int4" else 4
    data[start : start + width] = bytes(width - 1) + b"\x80" if bits == 0x80 else b"\xff" * width
    if bits == 0x80:
        data[start] = 1
    with pytest.raises(CodecFault):
        codec(name).decode(data, 5000)


def test_vectors_of_another_kind_are_refused():
    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="float32"):
            codec("int8").encode(wrong)
    with pytest.raises(ValueError, match="out must be"):
        codec("int8").decode(codec("int8").encode(torch.zeros(4)), 4, torch.zeros(5))
