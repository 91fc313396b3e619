"""Aggregators, norms, weights, error feedback: what bad or lopsided members can do, and what they cannot."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives.agreement import Member
from collectives.codecs import codec
from collectives.errors import NonFinite
from collectives.reduce import (
    Exchange,
    ExchangeSettings,
    Feedback,
    Layout,
    capped,
    norm_of,
    outliers,
    weighted_mean,
)
from collectives.reduce.robust import aggregate


def terms_of(rows, weights=None):
    return [
        (1.0 if weights is None else weights[n], np.asarray(row, np.float32)) for n, row in enumerate(rows)
    ]


def combined(name, rows, weights=None, trim=0.2, factor=1.0):
    out = np.empty(len(rows[0]), np.float32)
    aggregate(name, terms_of(rows, weights), out, trim=trim, clip_factor=factor)
    return out


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), min_size=1, max_size=9))
def test_the_median_is_numpys(rows):
    assert combined("median", rows) == pytest.approx(np.median(np.float32(rows), axis=0), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "trim", "drop"),
    [(5, 0.2, 1), (5, 0.0, 0), (10, 0.3, 3), (3, 0.49, 1), (2, 0.49, 0), (1, 0.4, 0)],
)
def test_the_trimmed_mean_leaves_out_the_extremes(count, trim, drop):
    rows = np.random.default_rng(0).standard_normal((count, 70_000)).astype(np.float32)
    wanted = np.sort(rows, axis=0)[drop : count - drop].mean(axis=0)
    assert combined("trimmed", rows, trim=trim) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["clip", "trimmed", "median"])
@pytest.mark.parametrize("attack", ["scale", "flip", "drift"])
def test_two_of_nine_cannot_move_the_result_far(name, attack):
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((9, 20_000)) + 1).astype(np.float32)
    honest = rows[2:].mean(axis=0)
    rows[:2] = {"scale": rows[:2] * 1e6, "flip": -10 * rows[:2], "drift": rows[:2] + 50}[attack]
    distance = float(np.linalg.norm(combined(name, rows, trim=0.25) - honest))
    naive = float(np.linalg.norm(rows.mean(axis=0) - honest))
    assert distance < 0.7 * np.linalg.norm(honest)
    assert distance < naive / 3


def test_the_centred_clip_of_a_close_crowd_is_nearly_its_weighted_mean():
    rng = np.random.default_rng(2)
    rows = (rng.standard_normal((8, 5000)) + 3).astype(np.float32)
    weights = [1, 2, 1, 2, 1, 2, 1, 2]
    mean = np.average(rows, axis=0, weights=weights)
    got = combined("clip", rows, weights, factor=1.5)
    assert float(np.linalg.norm(got - mean) / np.linalg.norm(mean)) < 0.01


def mesh_of(tools, rows, settings=None, codec_name="fp32", norms=None, weights=None):
    names = [f"p{n}" for n in range(len(rows))]
    members = [
        Member(name, 0, n, 1.0 if weights is None else weights[n], norm=0.0 if norms is None else norms[n])
        for n, name in enumerate(names)
    ]
    tensors = {name: [torch.as_tensor(row)] for name, row in zip(names, rows, strict=True)}
    mesh = tools.Mesh(
        tensors, tools.declare(members, codec=codec_name), settings or ExchangeSettings(), seed=1
    )
    mesh.run()
    return mesh


@pytest.mark.parametrize("name", ["clip", "trimmed", "median"])
@pytest.mark.parametrize("codec_name", ["fp32", "bf16"])
def test_an_exchange_aggregates_chunk_by_chunk(tools, name, codec_name):
    rows = torch.randn(5, 30_000)
    mesh = mesh_of(tools, rows, ExchangeSettings(aggregator=name, trim=0.25), codec_name)
    node = mesh.nodes["p0"]
    assert node.done
    made = codec(codec_name)
    for chunk in range(node.layout.chunks):
        start, end = node.layout.span(chunk)
        parts = [made.decode(bytearray(made.encode(row[start:end])), end - start).numpy() for row in rows]
        wanted = torch.from_numpy(combined(name, parts, trim=0.25))
        wanted = made.decode(bytearray(made.encode(wanted)), end - start)
        assert torch.equal(node.result.tensors[0][start:end], wanted)
    assert len({other.digest for other in mesh.nodes.values()}) == 1


def test_aggregators_but_the_mean_take_no_groups(tools):
    members = [Member(f"p{n}", 0, n, 1.0, group="x" if n < 2 else "") for n in range(4)]
    for name, flat in (("mean", False), ("median", True)):
        node = Exchange("p0", [torch.zeros(9)], tools.declare(members), ExchangeSettings(aggregator=name))
        assert node.plan.flat is flat


def test_who_sends_more_than_it_claimed_is_refused(tools):
    rows = torch.randn(3, 40_000)
    norms = [float(row.norm()) for row in rows]
    assert not any(node.refused for node in mesh_of(tools, rows, norms=norms).nodes.values())
    norms[1] /= 10
    mesh = mesh_of(tools, rows, norms=norms)
    assert {who: why for node in mesh.nodes.values() for who, why in node.refused.items()} == {"p1": "norm"}
    assert not mesh.nodes["p0"].done


@pytest.mark.parametrize("codec_name", ["fp32", "int8"])
def test_values_whose_sum_could_overflow_are_refused(tools, codec_name):
    rows = torch.randn(3, 40_000)
    rows[1] = 3e38
    names = ["p0", "p2"]
    members = [Member(f"p{n}", 0, n, 1.0) for n in range(3)]
    tensors = {f"p{n}": [rows[n]] for n in range(3)}
    mesh = tools.Mesh(tensors, tools.declare(members, codec=codec_name), seed=1)
    mesh.dead.add("p1")
    for name in names:
        while (frame := mesh.nodes["p1"].next_frame(name)) is not None:
            payload = memoryview(b"".join(bytes(part) for part in frame.payload))
            mesh.nodes[name].arrived("p1", frame.header, payload)
    mesh.run()
    assert [mesh.nodes[name].refused for name in names] == [{"p1": "norm"}] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_in_a_group_the_head_names_who_sends_no_numbers_as_soon_as_it_arrives(tools, bad):
    groups = ["x", "x", "x", ""]
    members = [Member(f"p{n}", 0, n, 1.0, group=groups[n]) for n in range(4)]
    tensors = {f"p{n}": [torch.randn(40_000)] for n in range(4)}
    tensors["p1"][0].fill_(bad)
    mesh = tools.Mesh(tensors, tools.declare(members), seed=1)
    mesh.dead.add("p1")
    heads = {"p0", "p2"}
    for name in heads:
        while (frame := mesh.nodes["p1"].next_frame(name)) is not None:
            mesh.nodes[name].arrived("p1", frame.header, memoryview(bytes(frame.payload[0])))
    for pair in (("p0", "p2"), ("p2", "p0")):
        while mesh.send(*pair) and mesh.deliver(*pair):
            pass
    assert all(mesh.nodes[name].refused == {"p1": "nonfinite"} for name in heads)
    assert not any(mesh.nodes[name]._boxes["p3"].partials for name in heads)


@pytest.mark.parametrize("codec_name", ["bf16", "int8", "int4", "topk"])
def test_what_a_codec_adds_to_a_norm_is_forgiven(tools, codec_name):
    rows = torch.randn(3, 40_000)
    mesh = mesh_of(tools, rows, codec_name=codec_name, norms=[float(row.norm()) for row in rows])
    assert all(node.done for node in mesh.nodes.values())


def test_sums_that_are_made_again_do_not_count_twice(tools):
    rows = torch.randn(4, 40_000)
    mesh = mesh_of(tools, rows, norms=[float(row.norm()) for row in rows])
    mesh.kill("p3")
    smaller = tools.without(mesh.nodes["p0"].declaration, "p3")
    mesh.rebase(smaller)
    mesh.run()
    assert all(mesh.nodes[name].done for name in mesh.live())


def test_who_claims_too_long_a_contribution_is_refused_by_the_others(tools):
    rows = torch.randn(4, 10_000)
    rows[2] *= 100
    norms = [float(row.norm()) for row in rows]
    mesh = mesh_of(tools, rows, ExchangeSettings(norm_factor=10.0), norms=norms)
    assert mesh.nodes["p0"].refused == {"p2": "norm"}
    assert mesh.nodes["p2"].refused == {}
    assert outliers({"a": 1.0, "b": 1.1, "c": 50.0, "d": math.nan, "e": -1.0}, 5.0) == {"c", "d", "e"}
    assert outliers({}, 2.0) == frozenset()


def test_norms_are_of_all_tensors_and_name_what_is_no_number():
    tensors = [torch.randn(300, 7).t(), torch.zeros(0), torch.full((9,), 3e30)]
    wanted = math.sqrt(float(tensors[0].double().square().sum()) + 9 * 3e30**2)
    assert norm_of(tensors) == pytest.approx(wanted)
    assert norm_of([]) == 0
    tensors[0][2, 5] = math.inf
    with pytest.raises(NonFinite, match="tensor 0 of 3"):
        norm_of(tensors)


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=12), st.floats(0.05, 1.0))
def test_nobody_weighs_more_than_the_share(weights, share):
    members = [Member(f"p{n}", 0, n, weight) for n, weight in enumerate(weights)]
    got = [member.weight for member in capped(members, share=share)]
    total = sum(got)
    weighty = sum(weight > 0 for weight in weights)
    assert all(now <= was for now, was in zip(got, weights, strict=True))
    for now, was in zip(got, weights, strict=True):
        if weighty * share >= 1:
            assert now <= share * total * (1 + 1e-9)
            if now < was:
                assert now == pytest.approx(share * total)
        elif was:
            assert now == min(weight for weight in weights if weight)


def test_weights_are_capped_for_all_and_by_identity(tools):
    members = [Member("a", 0, 1, 100.0), Member("b", 0, 2, 10.0), Member("c", 0, 3, 5.0)]
    assert [m.weight for m in capped(members, 20.0, None, {"b": 1.0})] == [20.0, 1.0, 5.0]
    rows = torch.randn(3, 5000)
    mesh = mesh_of(tools, rows, ExchangeSettings(weight_cap=8.0), weights=[100.0, 10.0, 5.0])
    wanted = weighted_mean([[term] for term in terms_of(rows.numpy(), [8.0, 8.0, 5.0])])
    assert mesh.nodes["p1"].result.tensors[0].numpy().tolist() == wanted.tolist()
    assert mesh.nodes["p1"].weights == {"p0": 8.0, "p1": 8.0, "p2": 5.0}


def test_members_without_weight_receive_and_contribute_nothing(tools):
    rows = torch.randn(3, 20_000)
    mesh = mesh_of(tools, rows, weights=[0.0, 1.0, 3.0])
    sent = mesh.nodes["p0"]
    wanted = weighted_mean([[term] for term in terms_of(rows.numpy()[1:], [1.0, 3.0])])
    assert sent.done
    assert sent.result.tensors[0].numpy().tolist() == wanted.tolist()
    zeros = mesh_of(tools, rows, weights=[0.0, 0.0, 0.0])
    assert float(zeros.nodes["p2"].result.tensors[0].abs().max()) == 0


@pytest.mark.parametrize("name", ["topk", "int4"])
def test_with_feedback_what_was_left_out_arrives_later(tools, name):
    torch.manual_seed(5)
    wanted = [torch.randn(20_000) for _ in range(2)]
    layout = Layout.of([wanted[0]])
    feedbacks = [Feedback(layout) for _ in range(2)]
    total = torch.zeros(20_000)
    rounds = 40
    for _ in range(rounds):
        members = [
            Member(f"p{n}", 0, n, 1.0, norm=norm_of([wanted[n]], layout, feedbacks[n])) for n in range(2)
        ]
        declaration = tools.declare(members, codec=name)
        mesh = tools.Mesh({f"p{n}": [wanted[n]] for n in range(2)}, declaration)
        mesh.nodes = {
            f"p{n}": Exchange(f"p{n}", [wanted[n]], declaration, feedback=feedbacks[n]) for n in range(2)
        }
        mesh.run()
        assert all(node.done for node in mesh.nodes.values())
        total += mesh.nodes["p0"].result.tensors[0]
        for n in range(2):
            feedbacks[n].commit([wanted[n]], codec(name))
    mean = (wanted[0] + wanted[1]) / 2
    assert float((total / rounds - mean).norm() / mean.norm()) < {"topk": 0.65, "int4": 0.12}[name]
    once = codec(name).decode(bytearray(codec(name).encode(mean)), 20_000)
    assert float((total / rounds - mean).norm()) < 0.8 * float((once - mean).norm()) or name == "int4"
    # Nothing is lost: what was sent and what is left over is what there was.
    left = torch.from_numpy(feedbacks[0].residual + feedbacks[1].residual) / 2
    if name == "topk":
        assert float((total + left - mean * rounds).norm() / (mean * rounds).norm()) < 0.01


def test_feedback_of_what_was_not_sent_is_all_of_it():
    values = torch.randn(5000)
    feedback = Feedback(Layout.of([values]))
    feedback.commit([values], codec("topk"), sent=False)
    assert torch.equal(torch.from_numpy(feedback.residual), values)
    feedback.commit([values], codec("fp32"))
    assert float(np.abs(feedback.residual).max()) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra_ratio", 0.5), ("aggregator", "mode"), ("trim", 0.5), ("trim", -0.1), ("norm_slack", -1.0),
        ("clip_factor", 0.0), ("norm_factor", math.nan), ("weight_cap", -1.0), ("weight_share_max", 0.0),
        ("weight_share_max", 1.5), ("wants_max", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ExchangeSettings(**{field: value})


def test_fingerprints_differ_where_results_would():
    base = ExchangeSettings()
    assert base.fingerprint == ExchangeSettings(extra_ratio=2.0, wants_max=3).fingerprint
    others = [
        ExchangeSettings(aggregator="clip"),
        ExchangeSettings(weight_cap=4.0),
        ExchangeSettings(flat=True),
    ]
    assert len({base.fingerprint, *[other.fingerprint for other in others]}) == 4


def test_in_a_group_honest_norms_are_counted_once(tools):
    groups = ["x", "x", "x", "", "y", "y"]
    rows = torch.randn(6, 40_000)
    norms = [float(row.norm()) for row in rows]
    hidden = {1, 2}  # so that one head sees all of their values
    members = [Member(f"p{n}", 0, n, 1.0 + n, 0.0, groups[n], n not in hidden, norms[n]) for n in range(6)]
    mesh = tools.Mesh({f"p{n}": [rows[n]] for n in range(6)}, tools.declare(members), seed=1)
    mesh.run()
    assert all(node.done and not node.refused for node in mesh.nodes.values())
