"""Adapters in the mesh: requests by their names, room for them, whose they are, and what is shared under them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import trio
from adapters_made import edit_config, edit_weights, make_adapter
from rings import CUTS, MANIFEST, ring_of, tokens_of, wish

from model_shards import Adapter, AdapterIndex, CheckpointError, ConfigError, Engine, NoRoom, load_span
from node import adverts, embedded, tuning
from node.adverts import AdapterAdvert, ModelAdvert
from node.atlas import Atlas
from node.config import DaemonConfig
from node.errors import ConfigProblem, ControlProblem, UnknownModel
from node.library import Library
from node.serve.prefixes import marks_of
from node.sharing import Asked, Sharing
from node.tuning import Ahead, Tuning
from p2p import BlobStore, Identity, RpcRefusal
from p2p.errors import RemoteFault

ONE, TWO = "1" * 64, "2" * 64
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
SHAPE = ("bfloat16", "none", 1, 4, 64, 8, 1 << 20, 0, 0, False, 1e6, 64, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two adapters of the embedded model, by manifest id."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in ((1, ONE), (2, TWO)):
        make_adapter(root / name, embedded.path(), TARGETS, rank=seed + 3, seed=seed)
    return root


def index_of(made, name, model):
    return AdapterIndex(made / name, model[0])


async def tuned(ring, made, model, *names):
    """Every stage has the adapters, and the mesh knows them as `one` and `two`."""
    for node in ring.nodes:
        engine = node.computes[MANIFEST].engine
        for name in names or (ONE, TWO):
            engine.add_adapter(index_of(made, name, model).load(name, engine.span.start, engine.span.end))
    for said, name in (("one", ONE), ("two", TWO)):
        ring.adapters[said] = AdapterAdvert(said, name, 1, MANIFEST)


@pytest.mark.parametrize("cut", ["one", "two", "four"])
async def test_requests_have_their_own_adapters_in_one_chain_and_the_text_they_have_alone(
    model, prompt, made, cut
):
    async with ring_of(model, CUTS[cut]) as ring:
        await tuned(ring, made, model)
        names = ["toy", "one", "two", "toy:one", "one", "toy"]
        alone = [await tokens_of(ring, wish(prompt, model=name)) for name in names[:3]]
        assert len({tuple(event.token for event in events) for events in alone}) == 3
        found = {}

        async def ask(at, name):
            found[at] = await tokens_of(ring, wish(prompt, model=name))

        async with trio.open_nursery() as nursery:
            for at, name in enumerate(names):
                nursery.start_soon(ask, at, name)
        assert [found[at] for at in range(6)] == [alone[at] for at in (0, 1, 2, 1, 1, 0)]
        infos = {info.name: (info.parent, info.manifest_id) for info in ring.gateway.models()}
        assert infos == {"toy": ("", MANIFEST), "one": ("toy", ONE), "two": ("toy", TWO)}
        await ring.quiet()


async def test_cut_chains_give_the_text_of_one_engine(model, prompt, made):
    async with ring_of(model, CUTS["one"]) as ring, ring_of(model, CUTS["four"]) as cut:
        for other in (ring, cut):
            await tuned(other, made, model)
        request = wish(prompt, model="one", temperature=0.9, seed=3)
        assert await tokens_of(ring, request) == await tokens_of(cut, request)


async def test_no_beginning_of_a_prompt_is_shared_with_another_adapter(model, prompt, made):
    long = (prompt * 40)[:300]
    async with ring_of(model, CUTS["two"]) as ring:
        await tuned(ring, made, model)
        first = {}
        for name in ("one", "toy", "two"):
            first[name] = await tokens_of(ring, wish(long, model=name))
            assert ring.count("shoal_prefix_cache_hits_total") == 0
        for name in ("two", "toy", "one"):
            assert await tokens_of(ring, wish(long, model=name)) == first[name]
        assert ring.count("shoal_prefix_cache_hits_total") == 3 * 256
    assert not set(marks_of(long)) & set(marks_of(long, ONE))
    assert not set(marks_of(long, TWO)) & set(marks_of(long, ONE))


async def test_an_adapter_that_no_stage_has_or_nobody_knows_is_told_and_others_go_on(model, prompt, made):
    async with ring_of(model, CUTS["two"]) as ring:
        await tuned(ring, made, model, ONE)
        with pytest.raises(UnknownModel):
            await tokens_of(ring, wish(prompt, model="toy:three"))
        with pytest.raises(Exception, match="asks for adapter '2222"):
            await tokens_of(ring, wish(prompt, model="two"))
        ring.adapters["odd"] = AdapterAdvert("odd", "../" + ONE, 1, MANIFEST)
        with pytest.raises(Exception, match="named by its manifest's id"):
            await tokens_of(ring, wish(prompt, model="odd"))
        assert len(await tokens_of(ring, wish(prompt, model="one"))) == 12
        await ring.quiet()


class Source:
    """A library that has all adapters, or says why not."""

    def __init__(self, made, model):
        self.made, self.model, self.problem, self.asked = made, model, None, []

    async def files(self, _):
        return SimpleNamespace(config=self.model[0])

    async def adapter(self, name, base):
        self.asked.append(name)
        if self.problem is not None:
            raise self.problem
        return SimpleNamespace(
            manifest=SimpleNamespace(name=name[:3]), index=AdapterIndex(self.made / name, base.config)
        )

    async def adapter_weights(self, files, start, end):
        assert (start, end) == (2, 5)


@pytest.fixture
def engine(model):
    return Engine(load_span(embedded.path(), model[1], model[0], 2, 5), kv_bytes_max=1 << 20)


def tuning_of(engine, source, spare):
    advert = ModelAdvert("toy", MANIFEST, 1, *SHAPE)
    return Tuning(source, advert, engine, lambda: spare - engine.adapter_bytes, trio.Lock())


async def test_adapters_take_spare_memory_only_and_unused_ones_give_way_oldest_first(model, made, engine):
    source = Source(made, model)
    sizes = [index_of(made, name, model).held_bytes(2, 5, "bfloat16") for name in (ONE, TWO)]
    found = tuning_of(engine, source, max(sizes))
    await found.adapt(ONE)
    assert (engine.adapters, engine.adapter_bytes) == ({ONE: 0}, sizes[0])
    with pytest.raises(NoRoom, match=f"takes {sizes[1]} bytes, {max(sizes) - sizes[0]} are spare"):
        await found.adapt(TWO, ahead=True)  # it would have to send another away
    await found.adapt(TWO)
    assert engine.adapters == {TWO: 0}
    engine.open("s", 2, 5, 8, adapter=TWO)
    with pytest.raises(NoRoom, match="are spare"):
        await found.adapt(ONE)
    assert engine.adapters == {TWO: 1}
    engine.close("s")
    async with found.holding(TWO):
        with pytest.raises(NoRoom, match="are spare"):
            await found.adapt(ONE)
        found.keep_only({ONE})
        assert engine.adapters == {TWO: 0}
    found.keep_only({ONE})
    assert (engine.adapters, engine.adapter_bytes) == ({}, 0)
    both = tuning_of(engine, source, sum(sizes))
    for name in (ONE, TWO, ONE):
        await both.adapt(name)
    both.shed(1)
    assert engine.adapters == {ONE: 0}  # TWO was the longest unused
    assert source.asked == [ONE, TWO, TWO, ONE, ONE, ONE, TWO]


async def test_what_fails_to_come_is_a_refusal_and_bad_values_a_models_fault(model, made, engine, tmp_path):
    source = Source(made, model)
    found = tuning_of(engine, source, 1 << 30)
    source.problem = RemoteFault("nobody has it")
    with pytest.raises(RpcRefusal, match=r"adapter 1111.*nobody has it") as refused:
        await found.adapt(ONE)
    assert refused.value.code == "unavailable"
    source.problem, source.made = None, tmp_path
    make_adapter(tmp_path / ONE, embedded.path(), ["q_proj"])
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    edit_weights(tmp_path / ONE, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"layers\.3.*contains nan"):
        await found.adapt(ONE)
    assert engine.adapters == {}


async def test_adapters_come_ahead_of_requests_and_a_failed_one_is_tried_again_later(
    model, made, engine, autojump_clock
):
    source = Source(made, model)
    source.problem = RemoteFault("not yet")
    known = [AdapterAdvert("one", ONE, 1, MANIFEST), AdapterAdvert("far", TWO, 1, "f" * 64)]
    found = tuning_of(engine, source, 1 << 30)
    async with trio.open_nursery() as nursery:
        ahead = Ahead(nursery.start_soon)
        for _ in range(3):
            ahead.look([found], known)
            await trio.testing.wait_all_tasks_blocked()
        assert source.asked == [ONE]
        source.problem = None
        await trio.sleep(tuning.AGAIN_S + 1)
        ahead.look([found], known)
        await trio.sleep(1)
        assert engine.adapters == {ONE: 0}
        ahead.look([found], known[1:])
        assert engine.adapters == {}


def atlas_of(*offers):
    models = {offer.name: offer for offer in offers if isinstance(offer, ModelAdvert)}
    adapters = {offer.name: offer for offer in offers if isinstance(offer, AdapterAdvert)}
    return Atlas({}, frozenset(), models, {}, {}, {}, adapters=adapters)


class Offering:
    """Remembers what is offered, and dropped."""

    def __init__(self, known):
        self.known, self.dropped = known, []

    def created_s(self, _):
        return 7

    def offer(self, advert):
        self.known.append(advert)

    def drop(self, offer):
        self.dropped.append(offer.name)


@pytest.fixture
def sharing(tmp_path, model):
    """Sharing of a node whose mesh has the embedded model as `toy` and another as `other`."""
    identity = Identity.generate()
    store = BlobStore(tmp_path / "blobs", quota_bytes=1 << 24)
    library = Library(identity, store, SimpleNamespace(fetch=_fetch), lambda _: [])
    offering = Offering([ModelAdvert(name, MANIFEST, 1, *SHAPE) for name in ("toy", "other")])
    files = SimpleNamespace(config=model[0])
    library._files[MANIFEST] = files
    library.publisher = partial(_publisher, identity)
    config = DaemonConfig(tmp_path)
    found = Sharing(str(identity.peer_id), config, library, offering, lambda: atlas_of(*offering.known), str)
    return found, offering, store


async def _fetch(*_given, **_more):
    """Everything is here."""


async def _publisher(identity, _):
    return identity.peer_id


async def test_an_adapter_is_shared_under_its_base_and_nothing_but_its_two_files(sharing, tmp_path):
    found, offering, store = sharing
    directory = tmp_path / "lora"
    make_adapter(directory, embedded.path(), TARGETS)
    (directory / "optimizer.pt").write_bytes(b"large")
    (directory / "checkpoint-1").mkdir()
    (directory / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"old")
    for said in ("toy", "hub/Toy", "/home/me/toy/"):
        edit_config(directory, base_model_name_or_path=said)
        advert = await found.add(directory, f"a-{len(said)}", Asked())
        assert (advert.base, offering.known[-1]) == (MANIFEST, advert)
    size = (directory / "adapter_model.safetensors").stat().st_size
    assert 0 < advert.size_bytes < size
    (manifest,) = [m for m in store.manifests() if m.id == advert.manifest_id]
    assert [entry.name for entry in manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]
    edit_config(directory, base_model_name_or_path="acme/unknown")
    with pytest.raises(
        ConfigProblem, match=r"base_model_name_or_path.*acme/unknown.*other, toy.*--base NAME"
    ):
        await found.add(directory, "b", Asked())
    assert (await found.add(directory, "b", Asked(base="other"))).name == "b"
    with pytest.raises(ConfigProblem, match=r"no-such.*a model of this mesh \(other, toy\)"):
        await found.add(directory, "c", Asked(base="no-such"))
    with pytest.raises(ConfigProblem, match="a name that no other model"):
        await found.add(directory, "toy", Asked(base="toy"))
    assert (await found.drop("other:b")).name == "b" or offering.dropped
    assert offering.dropped == ["b"]
    with pytest.raises(ControlProblem, match="there is no model 'z'"):
        await found.drop("z")


async def test_an_adapter_that_no_host_could_serve_is_not_shared(sharing, tmp_path):
    found, offering, _ = sharing
    directory = tmp_path / "lora"
    make_adapter(directory, embedded.path(), ["q_proj"], base_model_name_or_path="toy")
    edit_config(directory, r=5)
    with pytest.raises(CheckpointError, match="rank 5 imply"):
        await found.add(directory, "a", Asked())
    edit_config(directory, r=4, peft_type="LOHA")
    with pytest.raises(ConfigError, match="peft_type is 'LOHA'"):
        await found.add(directory, "a", Asked())
    edit_config(directory, peft_type="LORA")
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"
    edit_weights(directory, lambda tensors: tensors[name][0].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"layers\.7.*contains inf"):
        await found.add(directory, "a", Asked())
    assert len(offering.known) == 2


def test_adverts_of_adapters_are_read_with_care():
    good = AdapterAdvert("pirate", ONE, 1, MANIFEST.replace("m", "a"), 5)
    assert adverts.read(AdapterAdvert, adverts.write(good)) == good
    assert adverts.read_offer(adverts.ADAPTER, adverts.write(good)) == good
    assert adverts.read_offer(adverts.MODEL, adverts.write(good)) is None
    wrong = [{"name": "-x"}, {"base": "b"}, {"manifest_id": ""}, {"size_bytes": -1}, {"created_s": -1}]
    for change in [*wrong, {"base": ONE}]:
        assert adverts.read(AdapterAdvert, adverts.write(replace(good, **change))) is None


def test_the_offered_adapter_is_an_adapter_of_the_engine(made, model, engine):
    found = index_of(made, ONE, model).load(ONE, 2, 5)
    assert isinstance(found, Adapter)
    assert found.nbytes == index_of(made, ONE, model).held_bytes(2, 5, "bfloat16")
