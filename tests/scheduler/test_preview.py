import copy
import json

import pytest

from scheduler import PreviewError, Shortage, preview


def gpus(**counts):
    kinds = {
        "rtx5090": {"tflops": 104.8, "memory_gib": 32, "bandwidth_gbps": 1792},
        "rtx4090": {"tflops": 82.6, "memory_gib": 24, "bandwidth_gbps": 1008},
    }
    return [{"id": f"{kind}-{k}", **kinds[kind]} for kind, n in counts.items() for k in range(n)]


def qwen(layers, hidden, total_bytes, bytes_per_weight=2.0):
    vocabulary = 152064 * hidden * 2
    layer = (total_bytes - 2 * vocabulary) / layers
    return {
        "layers": layers,
        "layer_bytes": layer,
        "embed_bytes": vocabulary,
        "head_bytes": vocabulary,
        "layer_flops_per_token": 2 * layer / bytes_per_weight,
        "hidden_bytes": 2 * hidden,
        "kv_bytes_per_token_per_layer": 4096,
    }


REFERENCE = {
    "14B bf16": (qwen(48, 5120, 29.54e9), [36.9, 36.9, 42.8]),
    "32B bf16": (qwen(64, 5120, 65.53e9), [67.2, 89.9]),
    "72B int4": (qwen(80, 8192, 41.4e9, 0.5), [43.1, 43.1, 63.9]),
}


@pytest.mark.parametrize("prefer", ["balanced", "latency"])
@pytest.mark.parametrize("name", list(REFERENCE))
def test_the_reference_rows_are_beaten_in_every_replica(name, prefer):
    model, rows = REFERENCE[name]
    result = preview({"model": model, "nodes": gpus(rtx5090=5, rtx4090=2)}, prefer=prefer)
    ours = sorted(replica["ms_per_token"] for replica in result["replicas"])
    assert len(ours) == len(rows)
    assert all(a <= b for a, b in zip(ours, rows, strict=True)), ours


def document(**more):
    return {"model": qwen(48, 5120, 29.54e9), "nodes": gpus(rtx5090=2), **more}


def test_figures_of_two_stages_by_hand():
    result = preview(document())
    (replica,) = result["replicas"]
    model = document()["model"]
    (a, b) = (stage["end"] - stage["start"] for stage in replica["stages"])
    layer_ms, head_ms = model["layer_bytes"] / 1792e6, model["head_bytes"] / 1792e6
    assert replica["ms_per_token"] == pytest.approx(48 * layer_ms + head_ms + 2 * 10)
    assert replica["tokens_per_s"] == pytest.approx(1000 / max(a * layer_ms, b * layer_ms + head_ms))
    assert result["unused"] == []
    assert result["planning_s"] >= 0
    json.dumps(result)


def test_a_single_stage_pays_no_hop():
    nodes = [{"id": "big", "tflops": 100, "memory_gib": 80, "bandwidth_gbps": 2000}]
    (replica,) = preview(document(nodes=nodes))["replicas"]
    model = document()["model"]
    assert replica["ms_per_token"] == pytest.approx(
        (48 * model["layer_bytes"] + model["head_bytes"]) / 2000e6
    )


def test_batch_makes_arithmetic_count_and_yields_more_tokens():
    one, many = (preview(document(batch=batch, context_tokens=128))["replicas"][0] for batch in (1, 64))
    assert many["ms_per_token"] < 2 * one["ms_per_token"]
    assert many["tokens_per_s"] > 30 * one["tokens_per_s"]
    far = preview(document(batch=4096, context_tokens=0))["replicas"][0]
    model = document()["model"]
    flops_ms = 4096 * model["layer_flops_per_token"] / 104.8e9
    assert far["ms_per_token"] == pytest.approx(48 * flops_ms + model["head_bytes"] / 1792e6 + 20)


def test_hops_between_pairs_are_directed_and_default_to_hop_ms():
    names = [node["id"] for node in document()["nodes"]]
    base = preview(document())["replicas"][0]["ms_per_token"]
    between = {names[0]: {names[1]: 1.0}}
    assert preview(document(hop_ms_between=between))["replicas"][0]["ms_per_token"] == pytest.approx(base - 9)
    between[names[1]] = {names[0]: 2.0}
    assert preview(document(hop_ms_between=between))["replicas"][0]["ms_per_token"] == pytest.approx(
        base - 17
    )


def test_near_nodes_are_grouped():
    nodes = gpus(rtx5090=6)
    names = [node["id"] for node in nodes]
    between = {
        a: {b: 1 if (i % 3) == (j % 3) else 50 for j, b in enumerate(names)} for i, a in enumerate(names)
    }
    result = preview(document(nodes=nodes, hop_ms_between=between))
    for replica in result["replicas"]:
        assert len({names.index(stage["node"]) % 3 for stage in replica["stages"]}) == 1


@pytest.mark.parametrize("prefer", ["latency", "throughput"])
def test_prefer_maximises_its_own_sum(prefer):
    def sums(result):
        replicas = result["replicas"]
        return {
            "latency": sum(1000 / r["ms_per_token"] for r in replicas),
            "throughput": sum(r["tokens_per_s"] for r in replicas),
        }

    base = document(nodes=gpus(rtx5090=4, rtx4090=3))
    ours, balanced = preview(base, prefer=prefer), preview(base)
    assert sums(ours)[prefer] >= sums(balanced)[prefer] * (1 - 1e-9)
    assert ours["objective"] == pytest.approx(sums(ours)[prefer])
    assert preview({**base, "prefer": prefer})["replicas"] == ours["replicas"]


def test_tied_weights_are_one_on_a_single_node():
    model = {**qwen(4, 1024, 3e9), "tied": True}
    size = (4 * model["layer_bytes"] + model["head_bytes"]) / 2**30
    nodes = [{"id": "a", "tflops": 1, "memory_gib": size, "bandwidth_gbps": 100}]
    ask = {"model": model, "nodes": nodes, "weight_fraction": 1.0, "context_tokens": 0}
    assert len(preview(ask)["replicas"]) == 1
    with pytest.raises(Shortage):
        preview({**ask, "model": {**model, "tied": False}})


def test_the_cache_must_fit_beside_the_weights():
    fits = document(context_tokens=4096)
    assert preview(fits)["replicas"]
    with pytest.raises(Shortage, match=r"needs .* GiB for weights and cache, the mesh offers 64.0 GiB"):
        preview(document(context_tokens=400_000))


def test_a_pool_too_small_gets_the_exact_shortage():
    with pytest.raises(Shortage) as caught:
        preview(document(nodes=gpus(rtx4090=1)))
    assert caught.value.needed_bytes == pytest.approx(29.54e9, rel=1e-6)
    assert caught.value.available_bytes == int(0.65 * 24 * 2**30)


def test_no_nodes_is_a_shortage():
    with pytest.raises(Shortage):
        preview(document(nodes=[]))


def test_the_order_of_nodes_does_not_matter():
    nodes = gpus(rtx5090=3, rtx4090=4)
    first, second = preview(document(nodes=nodes)), preview(document(nodes=nodes[::-1]))
    first.pop("planning_s"), second.pop("planning_s")
    assert first == second


@pytest.mark.parametrize(
    ("path", "value", "right"),
    [
        (("model",), None, "given"),
        (("model",), [], "an object"),
        (("nodes",), {}, "a list"),
        (("nodes", 0), 3, "an object"),
        (("nodes", 0, "id"), "", "not empty"),
        (("nodes", 0, "id"), "rtx5090-1", "different from every other"),
        (("nodes", 0, "tflops"), 0, "above 0"),
        (("nodes", 0, "bandwidth_gbps"), "fast", "a number above 0"),
        (("nodes", 0, "memory_gib"), -1, "at least 0"),
        (("nodes", 0, "memory_gib"), float("nan"), "at least 0"),
        (("nodes", 0, "memory_gib"), True, "at least 0"),
        (("nodes", 0, "link_mbps"), 0, "above 0"),
        (("model", "layers"), 0, "a whole number from 1"),
        (("model", "layers"), 2.5, "a whole number from 1"),
        (("model", "layer_bytes"), 0, "above 0"),
        (("model", "head_bytes"), None, "given"),
        (("model", "tied"), "no", "true or false"),
        (("hop_ms",), -3, "at least 0"),
        (("hop_ms_between",), [], "an object"),
        (("hop_ms_between",), {"a": 3}, "an object"),
        (("hop_ms_between",), {"a": {"b": "x"}}, "at least 0"),
        (("context_tokens",), -1, "a whole number from 0"),
        (("batch",), 0, "a whole number from 1"),
        (("weight_fraction",), 1.5, "at most 1"),
        (("weight_fraction",), 0, "above 0"),
        (("prefer",), "speed", "one of balanced, latency, throughput"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_right(path, value, right):
    wrong = copy.deepcopy(document())
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(PreviewError) as caught:
        preview(wrong)
    assert right in str(caught.value)
    assert str(path[-1]) in caught.value.field or isinstance(path[-1], int)


def test_a_document_that_is_no_object_is_refused():
    with pytest.raises(PreviewError, match="document"):
        preview([])
