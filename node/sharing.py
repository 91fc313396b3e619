"""What this node gives to the mesh and takes back: models and adapters, by the order of its owner.

It checks a directory, has it published and says so; how far a model is served it reads from the mesh. What hosts do
with it is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from model_shards import AdapterConfig, is_adapter
from node.adverts import AdapterAdvert, ModelAdvert, Offer
from node.atlas import Atlas
from node.config import NAME_PATTERN, DaemonConfig
from node.errors import ConfigProblem, ControlProblem, DataDirProblem
from node.library import Library, Progress
from node.offering import Offering, who_added
from node.offers import model_advert
from p2p import P2pError


@dataclass(frozen=True, slots=True)
class Asked:
    """What the owner wants of a model that is added: `copies` of each layer (None: as configured), tags that its hosts
    must have, where others than those configured. Of an adapter: its `base` ("": as its configuration says)."""

    copies: int | None = None
    require: tuple[str, ...] = ()
    ends_require: tuple[str, ...] = ()
    base: str = ""


class Sharing:
    """`atlas()` is the current view, `detail(model)` why a model is not served."""

    def __init__(
        self,
        me: str,
        config: DaemonConfig,
        library: Library,
        offering: Offering,
        atlas: Callable[[], Atlas],
        detail: Callable[[ModelAdvert], str],
    ) -> None:
        self._me = me
        self._config = config
        self._library = library
        self._offering = offering
        self._atlas = atlas
        self._detail = detail

    async def add(self, directory: Path, name: str, asked: Asked, progress: Progress | None = None) -> Offer:
        """Offer a directory of a model or an adapter to the mesh.

        Raises ModelError, P2pError, and ConfigProblem for a name or a base that cannot be used."""
        if not NAME_PATTERN.fullmatch(name):
            raise ConfigProblem("name", name, "up to 128 letters, digits and . _ : / -, the first no sign")
        if is_adapter(directory):
            return await self._add_adapter(directory, name, asked.base, progress)
        if asked.base:
            raise ConfigProblem("base", asked.base, f"nothing: {directory} is no adapter's directory")
        files = await self._library.publish(directory, name, progress)
        known = self._known(name, files.manifest.id)
        if known is None:
            settings = replace(
                self._config,
                require=asked.require or self._config.require,
                ends_require=asked.ends_require or self._config.ends_require,
            )
            known = model_advert(
                files.config, files.index, settings,
                name=name, manifest_id=files.manifest.id,
                created_s=self._offering.created_s(files.manifest.id), copies=asked.copies or settings.copies,
            )  # fmt: skip
        self._offering.offer(known)
        return known

    async def _add_adapter(
        self, directory: Path, name: str, base: str, progress: Progress | None
    ) -> AdapterAdvert:
        model = self._base(directory, base)
        files = await self._library.publish_adapter(
            directory, name, await self._library.files(model.manifest_id), progress
        )
        known = self._known(name, files.manifest.id)
        if not isinstance(known, AdapterAdvert):
            created_s = self._offering.created_s(files.manifest.id)
            known = AdapterAdvert(name, files.manifest.id, created_s, model.manifest_id, files.index.bytes)
        self._offering.offer(known)
        return known

    def _known(self, name: str, manifest_id: str) -> Offer | None:
        """The mesh's offer of that name, which must be of that manifest."""
        atlas = self._atlas()
        known = atlas.models.get(name) or atlas.adapters.get(name)
        if known is not None and known.manifest_id != manifest_id:
            raise _taken(name)
        return known

    def _base(self, directory: Path, named: str) -> ModelAdvert:
        """The model of the mesh that an adapter is for: as told, or as its configuration names it. Raises ModelError
        and ConfigProblem."""
        said, models = AdapterConfig.from_dir(directory).base, self._atlas().models
        if named:
            model = self._atlas().model_named(named)
            if model is None:
                raise ConfigProblem("base", named, _one_of(models))
            return model
        last = said.rstrip("/").rpartition("/")[2].lower()
        found = models.get(said) or next(
            (m for name, m in models.items() if last and name.lower() == last), None
        )
        if found is None:
            raise ConfigProblem(
                "adapter_config.json: base_model_name_or_path", said,
                f"{_one_of(models)}; say which it is for with --base NAME",
            )  # fmt: skip
        return found

    async def drop(self, name: str) -> Offer:
        """Take a model or adapter (its name or manifest id) that was added here back from the mesh. Raises
        ControlProblem."""
        found = self._atlas().served_as(name)
        if found is None:
            raise ControlProblem(f"there is no model {name!r} in this mesh")
        offer = found[1] or found[0]
        try:
            publisher = await self._library.publisher(offer.manifest_id)
            if publisher != self._me:
                added = who_added(self._atlas(), publisher)
                raise ControlProblem(f"{offer.name} can be dropped only on the node that added it: {added}")
            self._offering.drop(offer)
        except (P2pError, DataDirProblem) as problem:
            raise ControlProblem(f"{offer.name} cannot be dropped now: {problem}") from None
        return offer

    def state(self, manifest_id: str) -> tuple[bool, str]:
        """(every layer has a ready host, what is missing in plain words) of a model, or of an adapter's base. Raises
        ConfigProblem where another model that was added at the same time has got the name, and where it is dropped."""
        atlas = self._atlas()
        served = atlas.served_as(manifest_id)
        if served is None:
            own = self._offering.offered(manifest_id)
            if own is None:
                raise ConfigProblem("model", manifest_id[:12], "one that was not dropped meanwhile")
            if own.name in atlas.models or own.name in atlas.adapters:
                raise _taken(own.name)
            return False, "the model is not known yet"
        return min(atlas.copies(served[0]), default=0) >= 1, self._detail(served[0])


def _taken(name: str) -> ConfigProblem:
    return ConfigProblem("name", name, "a name that no other model of this mesh has")


def _one_of(models: dict[str, ModelAdvert]) -> str:
    return f"a model of this mesh ({', '.join(sorted(models)) or 'there is none yet'})"
