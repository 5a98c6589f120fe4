"""Results for others: every_eval_ever's JSON, and the model-index of a model card.

What an upstream scored on audio whose labels it was fine-tuned on is no evidence of anything, and
is left out of both.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from downstream.report.compare import Row, scores
from downstream.report.groups import grouped, labels, results_of, version
from downstream.report.pool import Pool
from downstream.report.results import Result, Score, finite
from downstream.tasks.metrics import BOUNDED, of_result
from upstream.common import disk
from upstream.common.errors import UserError, near_miss
from upstream.common.packages import require_package
from upstream.common.text import HIDDEN, portable

LARGEST = 1 << 20  # bytes of a card
SCHEMA = "0.3.0"  # of every_eval_ever's eval.schema.json
CARD = "README.md"
FORMATS = ("every_eval_ever", "model-index")
HUB = {  # tasks as the Hugging Face Hub calls them; all others classify audio
    "asr": "automatic-speech-recognition", "pr": "automatic-speech-recognition",
    "asr_ted": "automatic-speech-recognition", "asv": "speaker-verification",
    "sd": "speaker-diarization", "sf": "slot-filling", "qbe": "spoken-term-detection",
}  # fmt: skip


class Shared(NamedTuple):
    """One metric of one task, and what made it."""

    row: Row
    score: Score  # of the first seed

    @property
    def corpus(self) -> str:
        corpus = self.score.recipe.get("corpus")
        name = corpus.get("name") if isinstance(corpus, dict) else None
        return str(portable(name) if isinstance(name, str) else self.row.suite)

    @property
    def interval(self) -> dict[str, float]:
        """Nothing where there is none."""
        return {} if math.isnan(self.row.low) else {"low": self.row.low, "high": self.row.high}


def shared(
    upstream: str, results: Sequence[Result], suite: str | None = None, pool: Pool | None = None
) -> list[Shared]:
    """All scores of an upstream but those on audio that it has heard. UserError if none is left."""
    mine = results_of(upstream, results)
    if suite is not None and suite not in (known := {r.cell.suite for r in mine}):
        raise UserError(f"{upstream} has no results in suite {suite!r}{near_miss(suite, known)}")
    chosen = [r for r in mine if suite in (None, r.cell.suite)]
    called, pool = labels(chosen), pool or Pool(results)
    found = [
        Shared(row, group[0].score)
        for _, group in sorted(grouped(chosen, version).items())
        for row in scores(group, called, pool)
        if not row.seen
    ]
    if not found:
        raise UserError(f"{upstream}: all that it was scored on was heard in fine-tuning")
    return found


def every_eval_ever(upstream: str, found: Sequence[Shared], organization: str) -> dict[str, Any]:
    """A record for https://github.com/evaleval/every_eval_ever."""
    first, upstream = found[0], portable(upstream)
    newest = max(found, key=lambda each: each.score.created).score.created
    model = upstream.removeprefix("hf:")
    suites = "+".join(dict.fromkeys(each.row.suite for each in found))
    now = str(int(time.time()))
    return {
        "schema_version": SCHEMA,
        "evaluation_id": f"speech-ft-bench-{suites}/{model}/{now}",
        "evaluation_timestamp": newest,
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": "Speech-FT Bench",
            "source_type": "evaluation_run",
            "source_organization_name": organization,
            "evaluator_relationship": "other",
        },
        "eval_library": {
            "name": "speech-ft-bench",
            "version": first.score.versions.get("project", "unknown"),
            "additional_details": _texts({**first.score.versions, **first.score.git}),
        },
        "model_info": {
            "name": upstream,
            "id": model,
            "additional_details": _texts(
                {
                    "fingerprint": first.row.fingerprint,
                    "weights": Path(first.score.source).name,
                    "deployment_type": "self_deployed",
                    "model_availability": "unknown",
                }
            ),
        },
        "evaluation_results": [_entry(each) for each in found],
    }


def _entry(each: Shared) -> dict[str, Any]:
    row, interval = each.row, each.interval
    metric = of_result(row.metric, row.better)
    bounds: dict[str, Any] = {}
    if row.metric in BOUNDED:
        bounds = {"score_type": "continuous", "min_score": 0.0, "max_score": 100.0}
    uncertainty: dict[str, Any] = {"num_samples": row.utterances}
    if interval:
        uncertainty["confidence_interval"] = {
            "lower": interval["low"],
            "upper": interval["high"],
            "confidence_level": 0.95,
            "method": f"t over {row.unit} and head seeds, jackknife",
        }
    return {
        "evaluation_name": f"{row.suite}/{row.task} {metric.label}",
        "source_data": {
            "dataset_name": each.corpus,
            "source_type": "other",
            "additional_details": _texts(
                {"split": "test", "utterances": row.utterances, row.unit: row.clusters,
                 "revision": row.recipe}
            ),
        },
        "evaluation_timestamp": each.score.created,
        "metric_config": {
            "evaluation_description": f"{metric.label} in per cent of a head on frozen features",
            "lower_is_better": row.better == "lower",
            **bounds,
        },
        "score_details": {
            "score": row.score,
            "details": _texts(
                {"head_seeds": row.seeds, "recipe": json.dumps(portable(each.score.recipe))}
            ),
            "uncertainty": uncertainty,
        },
    }  # fmt: skip


def as_json(record: dict[str, Any]) -> str:
    """JSON in which letters are letters, and what cannot be seen is escaped."""
    text = json.dumps(finite(record), indent=1, ensure_ascii=False)
    return HIDDEN.sub(lambda m: m[0] if m[0] == "\n" else json.dumps(m[0])[1:-1], text)


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in facts.items()}


def model_index(upstream: str, found: Sequence[Shared]) -> list[dict[str, Any]]:
    """For the front matter of a model card (huggingface_hub's EvalResult)."""
    data = require_package("huggingface_hub.repocard_data")
    entries = [
        data.EvalResult(
            task_type=HUB.get(str(each.score.recipe.get("task")), "audio-classification"),
            task_name=f"{each.row.suite}/{each.row.task}",
            dataset_type=each.corpus,
            dataset_name=each.corpus,
            dataset_config=f"{each.row.suite}/{each.row.task}",  # the Hub's key: each is one entry
            dataset_split="test",
            dataset_args={
                "utterances": each.row.utterances, each.row.unit: each.row.clusters,
                "revision": each.row.recipe,
            },
            metric_type=each.row.metric,
            metric_name=f"{of_result(each.row.metric, each.row.better).label} in per cent, mean "
            f"over {each.row.seeds} head seeds on frozen features",
            metric_value=round(each.row.score, 4),
            metric_args={key: round(value, 4) for key, value in each.interval.items()} or None,
        )
        for each in found
    ]  # fmt: skip
    return list(data.eval_results_to_model_index(portable(upstream), entries))


def write_card(card: Path, index: list[dict[str, Any]]) -> None:
    """Put a model-index into a card's front matter; the rest of the card stays. UserError."""
    cards = require_package("huggingface_hub.repocard")
    with disk.writing(card), disk.whole(card) as part:
        if card.is_file():
            part.write_bytes(disk.read(card, LARGEST))
        try:
            facts = cards.metadata_load(part) if card.is_file() else None
            cards.metadata_save(part, {**(facts or {}), "model-index": index})
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # or no mapping
            reason = " ".join(str(error).split())
            raise UserError(f"{card}: its front matter cannot be read ({reason:.200})") from error


def update_cards(results: Sequence[Result], root: Path, pool: Pool) -> list[Path]:
    """The model-index of cards of what was built below `root`, each by its newest results."""
    written = []
    folders: dict[Path, list[Result]] = {}
    for result in results:
        folder = root / Path(result.score.source).name
        places = [root.parent / result.score.source, Path(result.score.source)]  # today, before
        here = any(place.parent.resolve() == root.resolve() for place in places)
        if here and (folder / CARD).is_file():
            folders.setdefault(folder, []).append(result)
    for folder, mine in sorted(folders.items()):
        newest = max(mine, key=lambda r: r.score.created).cell
        try:
            found = shared(f"{newest.upstream}@{newest.fingerprint}", mine, pool=pool)
        except UserError:
            continue
        try:
            write_card(folder / CARD, model_index(newest.upstream, found))
        except UserError as error:  # at the end of a long run one card is not everything
            print(f"no scores in a card: {error}", file=sys.stderr)
            continue
        written.append(folder / CARD)
    return written
