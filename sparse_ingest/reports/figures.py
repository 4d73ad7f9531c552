"""The figures of a report, from the files of a run: settings, counts, speed, and the journals of its loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparse_ingest.cluster.index_admin import IndexReport
from sparse_ingest.cluster.journal import Journal, documents_of, journals, loaded_shards
from sparse_ingest.planning.report import PlanReport
from sparse_ingest.reporting import shortened
from sparse_ingest.reports.distributions import Distributions
from sparse_ingest.runs.files import COUNTS, totals_of
from sparse_ingest.runs.manifest import flattened
from sparse_ingest.runs.run import Run
from sparse_ingest.storage.addresses import without_secrets
from sparse_ingest.verification.comparison import VerifyReport

_REASONS = 20  # of refusals that are counted apart
_REASON_CHARACTERS = 200
_RECORDED = ("device", "host", "batch_tokens")  # of each shard, beside the versions
_SHOWN_ELSEWHERE = ("model", "corpus", "format", "fields")  # keys of the identity


@dataclass(frozen=True)
class ShardSpeed:
    """The documents of a shard, and the seconds that it took."""

    shard: int
    documents: int
    seconds: float


@dataclass(frozen=True)
class Refused:
    """Documents that the cluster refused for one reason; `example` is the id of one of them."""

    status: int
    reason: str
    documents: int
    example: str


@dataclass(frozen=True)
class LoadHistory:
    """The journal of the loads of a run into one index.

    `current` of the `shards` are in the index as they are in the run now. `documents` counts those sent or found
    unchanged, `seconds` is the sum over shards, which overlap. `waiting` are index settings that a stopped load has not
    restored.
    """

    cluster_uuid: str
    index_uuid: str
    shards: int
    current: int
    documents: int
    unchanged: int
    refused: int
    seconds: float
    pruning: list[dict[str, Any]]
    waiting: list[str]
    refusals: list[Refused]
    speeds: list[ShardSpeed]


@dataclass(frozen=True, kw_only=True)
class ReportFigures:
    """Result of `report`, and all that its page shows; `--json` prints these keys.

    `recorded` has the distinct devices, hosts, versions and token budgets of the shards, `seconds` the time per stage
    summed over shards. `index` and `mapping` (field to type) are None without an index, `plan` without a plan.
    `verification` is None if the index was not compared.
    """

    run: str
    run_id: str
    created: str
    release: str
    complete: bool
    model: dict[str, Any]
    corpus: list[dict[str, Any]]
    settings: dict[str, Any]
    auto: dict[str, Any]
    counts: dict[str, int]
    recorded: dict[str, list[Any]]
    seconds: dict[str, float]
    speeds: list[ShardSpeed]
    loads: list[LoadHistory]
    distributions: Distributions
    index: IndexReport | None = None
    mapping: dict[str, str] | None = None
    plan: PlanReport | None = None
    verification: VerifyReport | None = None

    @property
    def ok(self) -> bool:
        """False if the index differs from the run."""
        return self.verification is None or self.verification.ok

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        inner = {
            name: one and one.to_dict() for name, one in (("plan", self.plan), ("verification", self.verification))
        }
        return {**asdict(replace(self, plan=None, verification=None)), **inner}


def of_run(run: Run) -> dict[str, Any]:
    """Return the figures in the manifest and in the records of finished shards, by their names in `ReportFigures`.

    Raises:
        RunError: a record is damaged, or a shard is missing.
    """
    manifest, recorded = run.manifest, {name: dict[str, None]() for name in (*_RECORDED, "versions")}
    seconds: Counter[str] = Counter()
    speeds, counts = [], []
    for shard in run.done_shards():
        record = run.need_done(shard)
        spent = record.get("seconds", {})
        seconds.update(spent)
        speeds.append(ShardSpeed(shard, record["rows"], float(spent.get("wall", 0))))
        counts.append({name: record.get(name, 0) for name in COUNTS})
        versions = record.get("versions")
        of_shard = versions.items() if isinstance(versions, dict) else ()
        recorded["versions"] |= dict.fromkeys(f"{name} {number}" for name, number in of_shard)
        for name in _RECORDED:
            recorded[name] |= dict.fromkeys([str(record[name])] if name in record else [])
    identity = {**manifest.identity, **dict(flattened({"fields": manifest.identity.get("fields")}))}
    settings = {name: value for name, value in identity.items() if name not in _SHOWN_ELSEWHERE}
    corpus = identity.get("corpus")
    return {
        "run": str(run.path),
        "run_id": manifest.run_id,
        "complete": run.complete() is not None,
        "model": _clean(dict(flattened(manifest.model))),
        "corpus": _clean([one for one in corpus if isinstance(one, dict)] if isinstance(corpus, list) else []),
        "settings": _clean(settings),
        "auto": _clean(manifest.auto),
        "counts": totals_of(counts),
        "recorded": _clean({name: list(found) for name, found in recorded.items()}),
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "speeds": speeds,
        "loads": [_history(run, *uuids, journal) for uuids, journal in journals(run).items()],
    }


def _history(run: Run, cluster_uuid: str, index_uuid: str, journal: Journal) -> LoadHistory:
    lines, kinds = journal.finished(), Counter[tuple[int, str]]()
    examples: dict[tuple[int, str], str] = {}
    for letter in journal.dead():
        reason = without_secrets(shortened(letter.reason.replace(f"'{letter.doc_id}'", "…"), _REASON_CHARACTERS))
        kind = (letter.status, reason)
        kind = kind if kind in kinds or len(kinds) < _REASONS else (0, "other reasons")
        kinds[kind] += 1
        examples.setdefault(kind, letter.doc_id)
    rules = [line["rules"]["pruning"] for line in lines.values() if "rules" in line]
    return LoadHistory(
        cluster_uuid=cluster_uuid,
        index_uuid=index_uuid,
        shards=len(lines),
        current=len(loaded_shards(run, journal)),
        documents=sum(map(documents_of, lines.values())),
        unchanged=sum(line.get("unchanged", 0) for line in lines.values()),
        refused=kinds.total(),
        seconds=round(sum(map(_seconds, lines.values())), 3),
        pruning=[rule for place, rule in enumerate(rules) if rule not in rules[:place]],
        waiting=sorted(journal.settings()),
        refusals=[Refused(*kind, count, without_secrets(examples[kind])) for kind, count in kinds.most_common()],
        speeds=[ShardSpeed(shard, line["rows"], _seconds(line)) for shard, line in sorted(lines.items())],
    )


def _seconds(line: Mapping[str, Any]) -> float:
    spent = line.get("seconds")
    return float(spent) if isinstance(spent, int | float) else 0.0


def _clean(value: Any) -> Any:
    """Return JSON without the passwords and queries of addresses in its strings."""
    if isinstance(value, dict):
        return {name: _clean(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
