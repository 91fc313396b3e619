import pytest

from scheduler import Device, InputError, ModelShape, NodeShape, memory_needed
from scheduler.cost import decode_s_per_layer, experts_touched, prefill_s_per_token_per_layer
from scheduler.seating import rooms_of, seat_of


def test_memory_counts_embedding_head_cache_and_working_space_where_they_sit(build):
    model = build.model(
        layers=4, layer=100, embed=30, head=40, tied=False, context=10, kv=2, concurrency=3, working_bytes=7
    )
    cache = 2 * 10 * 3
    assert memory_needed(model, 1, 3) == 2 * (100 + cache) + 7
    assert memory_needed(model, 0, 3) == 3 * (100 + cache) + 30 + 7
    assert memory_needed(model, 1, 4) == 3 * (100 + cache) + 40 + 7
    assert memory_needed(model, 0, 4) == 4 * (100 + cache) + 30 + 40 + 7


@pytest.mark.parametrize("head", [0, 30])
def test_tied_weights_count_once_on_one_node_and_twice_on_two(build, head):
    model = build.model(layers=4, layer=100, embed=30, head=head, tied=True, context=0)
    assert memory_needed(model, 0, 4) == 430
    assert memory_needed(model, 0, 2) == 230
    assert memory_needed(model, 2, 4) == 230


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 2), (0, 9)])
def test_a_span_outside_the_model_is_refused(build, span):
    with pytest.raises(InputError, match="span"):
        memory_needed(build.model(layers=8), *span)


def test_a_bad_figure_is_named_with_its_value():
    with pytest.raises(InputError, match="layers is 0, it must be at least 1"):
        ModelShape(0, 1, 0, 0, False, 1.0, 1, 1, 1)


@pytest.mark.parametrize("mib", [0.1, 1.3, 2.0, 3.7, 5.5, 8.0, 20.0])
@pytest.mark.parametrize("tied", [True, False])
def test_rooms_are_exactly_what_memory_allows(build, mib, tied):
    model = build.model(layers=8, head=600_000, tied=tied, working_bytes=100_000)
    node = build.node("a", mib)
    inner, first, last, alone = rooms_of(model, node)

    def most(starts, ends):
        return max(
            (
                e - s
                for s in starts
                for e in ends
                if s < e and memory_needed(model, s, e) <= node.memory_bytes
            ),
            default=0,
        )

    assert first == most([0], range(1, 8)) or first == 8
    assert last == most(range(1, 8), [8]) or last == 8
    assert inner == most(range(1, 7), range(2, 8)) or inner >= 7
    assert (alone >= 8) == (memory_needed(model, 0, 8) <= node.memory_bytes)


def test_a_layer_never_lies_across_two_devices(build):
    model = build.model(layers=8, layer=100, embed=0, context=0)
    whole = build.node("a", 1)
    cut = build.node("a", 1, devices=(Device(150, 1e9, 1e9), Device(250, 1e9, 1e9), Device(90, 1e9, 1e9)))
    assert rooms_of(model, whole)[0] == 8
    assert rooms_of(model, cut)[0] == 3


def test_the_embedding_lies_on_the_device_where_it_costs_no_layer(build):
    model = build.model(layers=8, layer=100, embed=50, context=0)
    node = NodeShape("a", 390, 1e9, 1e9, devices=(Device(150, 1e9, 1e9), Device(240, 1e9, 1e9)))
    assert rooms_of(model, node)[:2] == (3, 3)


def test_decode_is_bound_by_reading_and_prefill_by_arithmetic(build):
    model = build.model()
    node = build.node("a", 8)
    assert decode_s_per_layer(model, node) == pytest.approx(700_000 / 2e10)
    assert prefill_s_per_token_per_layer(model, node) == pytest.approx(1_400_000 / 1e11)


def test_measured_times_win_over_the_roofline(build):
    node = build.node("a", 8, decode_s_per_layer=0.5, prefill_s_per_token_per_layer=0.25)
    assert decode_s_per_layer(build.model(), node) == 0.5
    assert prefill_s_per_token_per_layer(build.model(), node) == 0.25
    assert seat_of(build.model(), node).layer_s == 0.5


def test_experts_touched_grow_from_those_of_one_token_to_all():
    assert experts_touched(64, 8, 1) == pytest.approx(8)
    assert experts_touched(64, 8, 2) == pytest.approx(15)
    assert experts_touched(64, 8, 1000) == pytest.approx(64)
    assert experts_touched(0, 0, 5) == 0


def test_a_mixture_of_experts_reads_only_what_it_touches(build):
    dense = build.model(layer=1_000_000)
    sparse = build.model(layer=1_000_000, experts=8, experts_per_token=1, expert_bytes=100_000)
    node = NodeShape("a", 8 << 20, 1e13, 2e10)
    assert decode_s_per_layer(sparse, node) == pytest.approx(300_000 / 2e10)
    assert decode_s_per_layer(sparse, node) < decode_s_per_layer(dense, node)
