"""From raw records to columns: whose they are, the contract check, duplicates, each lane's share. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from msgspec import UNSET
from numpy.typing import NDArray

from features.plan import EventSpec, Plan, find_contract
from features.source import Place, Source
from features.texts import decimal_texts, hash64
from store.keys import shards_of
from streams.chunk import Chunk, DeadLetter, Happened, Ints, Part, Partition
from streams.contract import Accepted, ContractDecoder, Given
from streams.dedupe import Dedupe
from streams.opened import Opened, Schemas, identity_of, ids_of, opened, places_of, time_of, times_ms

_Of = TypeVar("_Of")
_CLAIMS_MAX: Final = 10_000
"""So many different values, together, of what tells contracts apart are remembered."""


@dataclass(frozen=True)
class Decoded:
    """What a chunk holds: a part a lane, what contracts refuse, how many records were duplicates, how many nobody's."""

    parts: list[Part]
    dead_letters: list[DeadLetter]
    events: int
    duplicates: int
    unclaimed: int


@dataclass(frozen=True)
class CheckedEvents:
    """Events of one contract in a chunk.

    Attributes:
        spec: the contract.
        accepted: what it accepts, of this chunk and maybe others.
        mine: which of them are the chunk's.
        offsets: int64[mine].
        record_ms: int64[mine].
        counted: bool[mine]: those that are new, and no duplicates.
    """

    spec: EventSpec
    accepted: Accepted
    mine: slice
    offsets: Ints
    record_ms: Ints
    counted: NDArray[np.bool_]


@dataclass(frozen=True)
class Checked:
    """A chunk that was checked against the contracts of its topic and for duplicates.

    Attributes:
        chunk: what was checked.
        events: those of each contract, also where there are none.
        horizon: see `streams.chunk.Part`.
        dead_letters: what contracts refuse.
        duplicates: how many are.
        unclaimed: how many are no contract's.
    """

    chunk: Chunk
    events: list[CheckedEvents]
    horizon: int
    dead_letters: list[DeadLetter]
    duplicates: int
    unclaimed: int


def no_schemas(format_: str, _value: bytes) -> Any:
    """For decoders that are given no way to schemas."""
    msg = f"there is no schema registry for {format_}: set HEADRACE_SCHEMA_REGISTRY"
    raise ValueError(msg)


class Decoder:
    """Decodes chunks; remembers each partition's event_ids within the dedupe horizon.

    Args:
        plan: the plan.
        lanes: how many there are.
        dedupe_ms: the horizon.
        schemas: of formats that need them; may raise OSError.

    Raises:
        CodeChangedError: if a contract's code is not what was applied.
    """

    def __init__(self, plan: Plan, lanes: int, dedupe_ms: int, schemas: Schemas = no_schemas) -> None:
        self._plan = plan
        self._lanes = lanes
        self._dedupe_ms = dedupe_ms
        decoders = {spec.name: ContractDecoder(spec.name, find_contract(spec)) for spec in plan.events}
        self._topics = {topic: Topic(specs, decoders, schemas) for topic, specs in plan.topics.items()}
        self._dedupes: dict[Partition, Dedupe] = {}

    def decode(self, chunk: Chunk) -> Decoded:
        """The parts of a chunk, one for every lane, also where it holds no event."""
        (decoded,) = self.decode_all([chunk])
        return decoded

    def decode_all(self, chunks: Sequence[Chunk]) -> list[Decoded]:
        """As `decode`, of chunks of several partitions: those of one topic are checked together."""
        return self._by_topic(chunks, self._decoded)

    def check_all(self, chunks: Sequence[Chunk]) -> list[Checked]:
        """Chunks of several partitions, checked as to be decoded."""
        return self._by_topic(chunks, self._checked)

    @staticmethod
    def _by_topic(chunks: Sequence[Chunk], of_topic: Callable[[list[Chunk]], Iterable[_Of]]) -> list[_Of]:
        found: dict[int, _Of] = {}
        for topic in dict.fromkeys(chunk.partition.topic for chunk in chunks):
            places = [place for place, chunk in enumerate(chunks) if chunk.partition.topic == topic]
            found.update(zip(places, of_topic([chunks[place] for place in places]), strict=True))
        return [found[place] for place in range(len(chunks))]

    def _checked(self, chunks: list[Chunk]) -> Iterator[Checked]:
        topic = self._topics[chunks[0].partition.topic]
        record_ms = np.concatenate([chunk.record_ms for chunk in chunks])
        offsets = np.concatenate([chunk.offsets for chunk in chunks])
        judged = topic.judge(chunks, record_ms, offsets)
        index, hashes = judged.hashes()
        repeated = np.zeros(len(offsets), bool)
        ends = [0, *accumulate(len(chunk.values) for chunk in chunks)]
        for chunk, (begin, end) in zip(chunks, pairwise(ends), strict=True):
            dedupe = self._dedupes.setdefault(chunk.partition, Dedupe(self._dedupe_ms))
            within = slice(*np.searchsorted(index, (begin, end)).tolist())
            own = index[within]
            repeated[own] = dedupe.duplicates(offsets[own], hashes[within], record_ms[own])
            fresh = chunk.offsets >= chunk.fresh
            events = []
            for spec, accepted in judged.accepted:
                mine = slice(*np.searchsorted(accepted.index, (begin, end)).tolist())
                at = accepted.index[mine]
                counted = (offsets[at] >= chunk.fresh) & ~repeated[at]
                events.append(CheckedEvents(spec, accepted, mine, offsets[at], record_ms[at], counted))
            dead_letters = [
                DeadLetter(chunk.partition, int(chunk.offsets[at]), chunk.keys[at], chunk.values[at], reason)
                for at, reason in ((place - begin, reason) for place, reason in judged.refused if begin <= place < end)
                if fresh[at]
            ]
            yield Checked(
                chunk,
                events,
                dedupe.horizon(chunk.end, int(chunk.record_ms.min()) if len(chunk.record_ms) else -1),
                dead_letters,
                int((repeated[begin:end] & fresh).sum()),
                int((judged.unclaimed[begin:end] & fresh).sum()) if judged.unclaimed is not None else 0,
            )

    def _decoded(self, chunks: list[Chunk]) -> Iterator[Decoded]:
        shards: dict[str, dict[str, tuple[pa.StringArray, Ints]]] = {}
        for checked in self._checked(chunks):
            happened: dict[str, list[Happened]] = {}
            for each in checked.events:
                name, mine, counted, accepted = each.spec.name, each.mine, each.counted, each.accepted
                if name not in shards:
                    shards[name] = self._shards(accepted)
                if not counted.any():
                    continue
                times = np.minimum(accepted.times_ms[mine], each.record_ms)
                fields = {field: column[mine] for field, column in accepted.fields.items()}
                for entity, (every, of_shard) in shards[name].items():
                    ids = every[mine]
                    concerned = counted & np.asarray(ids.is_valid()) if ids.null_count else counted
                    given = (ids, of_shard[mine], each.offsets, times, fields)
                    happened.setdefault(entity, []).append(Happened(name, *given).take(concerned))
            parts = self._parts(checked.chunk, checked.horizon, happened)
            n_events = sum(int(each.counted.sum()) for each in checked.events)
            yield Decoded(parts, checked.dead_letters, n_events, checked.duplicates, checked.unclaimed)

    def _shards(self, accepted: Accepted) -> dict[str, tuple[pa.StringArray, Ints]]:
        """By entity that events name: whom each names, and the shard."""
        named = {
            entity.name: decimal_texts(accepted.fields[entity.key])
            for entity in self._plan.entities
            if entity.key in accepted.fields
        }
        return {entity: (ids, shards_of(ids, self._plan.shards)) for entity, ids in named.items()}

    def _parts(self, chunk: Chunk, horizon: int, events: Mapping[str, list[Happened]]) -> list[Part]:
        latest_ms = int(chunk.record_ms.max(initial=-1))
        start = max(chunk.start, chunk.fresh)
        return [
            Part(
                chunk.partition,
                start,
                max(chunk.end, start),
                horizon,
                latest_ms,
                {
                    entity: tuple(each.take(each.shards % self._lanes == lane) for each in happened)
                    for entity, happened in events.items()
                },
                chunk.low,
                chunk.topic_id,
            )
            for lane in range(self._lanes)
        ]


class Judged(NamedTuple):
    """Records of a topic: what each contract accepts, why others are refused, and which are nobody's (bool[n])."""

    accepted: list[tuple[EventSpec, Accepted]]
    refused: list[tuple[int, str]]
    unclaimed: NDArray[np.bool_] | None

    def hashes(self) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
        """The places of all that are accepted, ascending, and the hash of each one's event_id in its contract."""
        if len(self.accepted) == 1:
            ((_, only),) = self.accepted
            return only.index, hash64(only.event_ids)
        salts = hash64(pa.array([spec.name for spec, _ in self.accepted]))
        index = np.concatenate([each.index for _, each in self.accepted])
        hashes = [hash64(each.event_ids) ^ salt for (_, each), salt in zip(self.accepted, salts, strict=True)]
        order = np.argsort(index, kind="stable")
        return index[order], np.concatenate(hashes)[order]


class Topic:
    """The contracts of a topic.

    Args:
        specs: the contracts.
        decoders: theirs, by name.
        schemas: as of `Decoder`.
    """

    def __init__(
        self, specs: Sequence[EventSpec], decoders: Mapping[str, ContractDecoder], schemas: Schemas = no_schemas
    ) -> None:
        self._specs, self._decoders, self._schemas = specs, decoders, schemas
        self._written: dict[tuple[str, str, str], list[int]] = {}
        """Which are written alike."""
        for number, spec in enumerate(specs):
            source = spec.reads
            self._written.setdefault((source.format, source.schema, source.envelope), []).append(number)
        self._claims: list[_Claims] = [_Claims([(n, specs[n].reads) for n in own]) for own in self._written.values()]

    def judge(self, chunks: Sequence[Chunk], record_ms: Ints, offsets: Ints) -> Judged:
        """What the contracts say of chunks of one topic; `record_ms` and `offsets` are those of all their records."""
        values = [value for chunk in chunks for value in chunk.values]
        if len(self._specs) == 1 and self._specs[0].reads.is_plain:
            (spec,) = self._specs
            accepted, wrong = self._decoders[spec.name].decode(values, record_ms)
            return Judged([(spec, accepted)], wrong, None)
        headers = [each for chunk in chunks for each in (chunk.headers or [()] * len(chunk.values))]
        claimed = np.full(len(values), -1)
        by_number: dict[int, tuple[Opened, dict[Place, list[Any]]]] = {}
        unreadable: list[dict[int, str]] = []
        for numbers, claims in zip(self._written.values(), self._claims, strict=True):
            own = self._specs[numbers[0]].reads
            found = opened(own, values, headers, self._schemas)
            looked = found.look(place for n in numbers for place in places_of(self._specs[n].reads))
            claims.claim(looked, claimed)
            unreadable.append(found.unreadable)
            by_number |= dict.fromkeys(numbers, (found, looked))
        every: list[tuple[EventSpec, Accepted]] = []
        refused: list[tuple[int, str]] = []
        for number, spec in enumerate(self._specs):
            places = np.flatnonzero(claimed == number)
            found, looked = by_number[number]
            given = self._given(spec.reads, found, looked, places, chunks, record_ms, offsets)
            bodies = [found.bodies[at] for at in places.tolist()]
            mine, wrong = self._decoders[spec.name].decode(bodies, record_ms[places], given)
            every.append((spec, Accepted(places[mine.index], mine.event_ids, mine.times_ms, mine.fields)))
            refused += [
                (at, found.unreadable.get(at, reason)) for at, reason in ((int(places[own]), why) for own, why in wrong)
            ]
        # What nobody can read may be anyone's.
        lost = set.intersection(*(set(each) for each in unreadable))
        refused += [(at, unreadable[0][at]) for at in sorted(lost) if claimed[at] < 0]
        unclaimed = claimed < 0
        unclaimed[list(lost)] = False
        return Judged(every, sorted(refused), unclaimed)

    @staticmethod
    def _given(
        source: Source,
        found: Opened,
        looked: Mapping[Place, list[Any]],
        places: NDArray[np.intp],
        chunks: Sequence[Chunk],
        record_ms: Ints,
        offsets: Ints,
    ) -> Given:
        """Times and identities that are no fields."""
        time, identity, at = time_of(source), identity_of(source), places.tolist()
        ids: list[str] | None = None
        times: list[int] | None = None
        refused: dict[int, str] = {}
        if time is not None and time.at is None:
            times = record_ms[places].tolist()
        elif time is not None and time.at is not None:
            of_record = record_ms[places].tolist() if source.envelope == "cloudevents" else None
            times, refused = times_ms([looked[time.at][each] for each in at], time, of_record)
        if identity is not None and identity.at:
            ids, wrong = ids_of([[looked[place][each] for each in at] for place in identity.at], identity)
            refused = wrong | refused
        elif identity is not None:
            names = [f"{chunk.partition.topic}-{chunk.partition.number}" for chunk in chunks for _ in chunk.values]
            ids = [f"{names[each]}-{offsets[each]}" for each in at]
        elif found.digests is not None:
            ids = [found.digests[each] for each in at]
        return Given(ids, times, refused)


class _Claims:
    """Whose a record is, of contracts that are written alike: at most one's, as they exclude each other."""

    def __init__(self, contracts: Sequence[tuple[int, Source]]) -> None:
        self._contracts = contracts
        self._places = tuple(dict.fromkeys(each.at for _, source in contracts for each in source.when))
        self._known: dict[tuple[Any, ...], int] = {}

    def claim(self, looked: Mapping[Place, list[Any]], claimed: Ints) -> None:
        """Writes the number of the contract of each record that has one."""
        if not self._places:
            claimed[:] = self._contracts[0][0]
            return
        if len(self._known) > _CLAIMS_MAX:
            self._known = {}
        known = self._known
        for at, values in enumerate(zip(*(looked[place] for place in self._places), strict=True)):
            # True is no 1, and what can't be a key is none of the values.
            key = tuple((type(value), value) if isinstance(value, str | int) else UNSET for value in values)
            number = known.get(key)
            if number is None:
                number = known[key] = self._whose(dict(zip(self._places, key, strict=True)))
            if number >= 0:
                claimed[at] = number

    def _whose(self, found: Mapping[Place, Any]) -> int:
        for number, source in self._contracts:
            if all(found[each.at] in {(type(value), value) for value in each.values} for each in source.when):
                return number
        return -1
