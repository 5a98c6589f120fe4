"""Ratios and tables from the raw figures of one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.bench import growth

Raw = dict[str, Any]  # {"s3prl": {task: figures}, "ours": {task: figures}, "encoder", "plan"}

FAIRNESS = """\
`encoder`, `heads`, `reading` are shares of our time; `reached` is the limit's share of it; `seen`
is how often an utterance is trained on, all learning rates together.

What differs, and who gains by it:
- s3prl runs the encoder in every micro-step of every learning rate; here it passes once over the
  corpus. How much that wins grows with the number of times an utterance is seen (`seen` below).
- {goal}.
  s3prl: measured {micro} (micro-batches x utterances), scaled.
  Here: measured {steps} steps, scaled where that is not all of them.
  Scaling goes by the audio in the batches.
- Not charged to s3prl: reading audio, decoding and logging of training batches, dev evaluations.
  Charged here: all reading, and the dev evaluations of trainings measured in full.
- SID: s3prl draws a new 8-second crop each time, we have four fixed crops of a long utterance.
- ASR and PR share one pass here; both rows are charged with it, the total once.
- s3prl's expert, featurizer, heads, SpecAugment and optimizer are its own classes; its recurrent
  head is one packed bidirectional LSTM per layer, ours two padded ones with the same function.
- Both: float32 without TF32, the same weights, audio, batch sizes, steps and learning rates.
The limit is one pass and all heads' arithmetic at this machine's best matrix product, {peak}."""

GROWTH = """\
A whole run of the command, start of Python and all, on FLAC files of real speech, through a tiny
encoder (24,000 parameters): what grows is all around the encoder."""


class Row(NamedTuple):
    """One line of the table: seconds of the whole work, and where ours go."""

    name: str
    s3prl: float
    encoder: float
    heads: float
    reading: float
    limit: float
    seen: float | None

    @property
    def ours(self) -> float:
        return self.encoder + self.heads + self.reading


def rows(raw: Raw) -> list[Row]:
    """A row per task and one for all, where the pass that PR and ASR share counts once."""
    found = []
    peak = raw["encoder"]["peak_flops"]
    repeated = {"encoder": 0.0, "reading": 0.0, "limit": 0.0}
    for task, ours in raw["ours"].items():
        done = ours
        if not ours["pass_audio_seconds"]:  # ASR found PR's pass
            done = raw["ours"]["pr"]
        theirs, whole = raw["s3prl"][task], ours["whole"]
        waited = done["extract_seconds"] - done["encoder_seconds"]
        one_pass = done["encoder_flops"] / peak
        if done is not ours:
            repeated = {"encoder": done["encoder_seconds"], "reading": waited, "limit": one_pass}
        utterances = whole["steps"] * whole["accumulate"] * whole["batch"] * whole["rates"]
        row = Row(
            name=task.upper(),
            s3prl=theirs["scaled_encoder"] + theirs["scaled_heads"],
            encoder=done["encoder_seconds"],
            heads=ours["scaled_heads"],
            reading=ours["scaled_reading"] + waited,
            limit=one_pass + ours["heads_flops"] / peak,
            seen=utterances / ours["utterances"],
        )
        found.append(row)
    every = [sum(row[k] for row in found) for k in range(1, 6)]  # type: ignore[misc]
    s3prl, encoder, heads, reading, limit = every
    total = Row(
        name="all",
        s3prl=s3prl,
        encoder=encoder - repeated["encoder"],
        heads=heads,
        reading=reading - repeated["reading"],
        limit=limit - repeated["limit"],
        seen=None,
    )
    return [*found, total]


def ratios(raw: Raw) -> dict[str, float]:
    """The figures that the project's targets are about."""
    by_name = {row.name: row for row in rows(raw)}
    sid, er, pr, asr = (by_name[name] for name in ("SID", "ER", "PR", "ASR"))
    theirs, ours, one = list(raw["s3prl"].values()), list(raw["ours"].values()), raw["encoder"]

    def total(figures: list[dict[str, float]], key: str) -> float:
        return sum(figure[key] for figure in figures)

    their_speed = total(theirs, "encoder_seconds") / total(theirs, "audio_seconds")
    our_speed = total(ours, "encoder_seconds") / total(ours, "pass_audio_seconds")
    return {
        "sid_er": (sid.s3prl + er.s3prl) / (sid.ours + er.ours),
        "pr": pr.s3prl / pr.ours,
        "asr": asr.s3prl / asr.ours,
        "total": by_name["all"].s3prl / by_name["all"].ours,
        "encoder": their_speed / our_speed,
        "encoder_alone": one["s3prl_alone_seconds"] / one["ours_alone_seconds"],
        "encoder_of_bound": one["flops"] / one["peak_flops"] / min(one["forward_seconds"]),
        "end_to_end_of_bound": one["flops"] / one["peak_flops"] / min(one["pass_seconds"]),
        "alpha": min(one["further_pass_seconds"]) / min(one["pass_seconds"]),
        "merge": raw["merge"]["merge_seconds"] / raw["merge"]["copy_seconds"],
        "plan_seconds": raw["plan"]["second_seconds"],
        **_low(one),
    }


def _low(one: dict[str, Any]) -> dict[str, float]:
    """Shares of the bfloat16 peak, where it was measured."""
    if "low_peak_flops" not in one:
        return {}
    least = one["flops"] / one["low_peak_flops"]
    return {
        "low_encoder_of_bound": least / one["low_forward_seconds"],
        "low_end_to_end_of_bound": least / one["low_pass_seconds"],
        "low_error": max(one["low_error_by_layer"]),
    }


def table(raw: Raw) -> str:
    """Markdown for the log and the README, and the statement of what differs."""
    lines = [
        "| task | s3prl | here | times | encoder | heads | reading | limit | reached | seen |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(raw):
        parts = [f"{part / row.ours:.0%}" for part in (row.encoder, row.heads, row.reading)]
        cells = [row.name, _clock(row.s3prl), _clock(row.ours), f"{row.s3prl / row.ours:.1f}"]
        cells += [*parts, _clock(row.limit), f"{row.limit / row.ours:.0%}"]
        lines.append(f"| {' | '.join([*cells, f'{row.seen:.0f}' if row.seen else ''])} |")
    grown = growth.table([growth.Point(**each) for each in raw.get("growth", [])])
    parts = [*lines, "", *_facts(raw), "", _statement(raw)]
    return "\n".join([*parts, *(["", GROWTH, "", grown] if "growth" in raw else [])])


def _facts(raw: Raw) -> list[str]:
    one, found, plan, merge = raw["encoder"], ratios(raw), raw["plan"], raw["merge"]
    their = ", ".join(f"{task.upper()} {_shares(f)}" for task, f in raw["s3prl"].items())
    place = "gpu" if one["machine"]["gpu"] else "main"
    held = {
        side: max(figures["memory_gb"][place] for figures in raw[side].values())
        for side in ("s3prl", "ours")
    }
    qbe = raw.get("qbe") or {}
    searched = (
        f"s3prl {_clock(qbe['s3prl_seconds'])}, here {_clock(qbe['our_seconds'])}, "
        f"{qbe['s3prl_seconds'] / qbe['our_seconds']:.1f} times; scores differ by at most "
        f"{qbe['difference']:.1g}"
        if qbe
        else "not measured: s3prl's needs `pip install dtw-python`"
    )
    return [
        f"- encoder: {found['encoder']:.2f} times s3prl's speed per second of real audio "
        f"({found['encoder_alone']:.2f} utterance by utterance), "
        f"{found['encoder_of_bound']:.0%} of the matrix-multiply bound; from FLAC files to "
        f"finished means {found['end_to_end_of_bound']:.0%}",
        *_bfloat16(found),
        *_workers(raw.get("growth", [])),
        f"- a further alpha: {found['alpha']:.2f} of a pass; by arithmetic "
        f"{1 - one['cnn_flops'] / one['flops']:.2f}",
        f"- where s3prl's time goes, encoder / head / reading: {their}",
        f"- peak memory: s3prl {held['s3prl']:.1f} GB, here {held['ours']:.1f} GB",
        f"- plan on {plan['files']:,} files: {plan['first_seconds']:.1f} s, "
        f"then {plan['second_seconds']:.1f} s",
        f"- QbE, all pairs and layers of one split: {searched}",
        f"- merge: {merge['merge_seconds']:.2f} s, {found['merge']:.1f} times copying both files; "
        f"{merge['peak_mb'] - merge['before_mb']:.0f} MB of memory of its own",
    ]


def _bfloat16(found: dict[str, float]) -> list[str]:
    if "low_error" not in found:
        return []
    return [
        f"- bfloat16: {found['low_encoder_of_bound']:.0%} of its matrix-multiply bound, from FLAC "
        f"files to finished means {found['low_end_to_end_of_bound']:.0%}; hidden states at most "
        f"{found['low_error']:.2%} from float32"
    ]


def _workers(points: Sequence[dict[str, Any]]) -> list[str]:
    """How much faster a whole run is with more processes."""
    alone = {p["hours"]: p["seconds"] for p in points if p["workers"] == 1}
    return [
        f"- {p['workers']} workers: {alone[p['hours']] / p['seconds']:.2f} times as fast as one, "
        f"a whole run over {p['hours']:g} h"
        for p in points
        if p["workers"] > 1 and p["hours"] in alone
    ]


def _shares(figures: dict[str, float]) -> str:
    spent = [figures[f"{part}_seconds"] for part in ("encoder", "head", "input")]
    return " / ".join(f"{part / sum(spent):.1%}" for part in spent)


def _statement(raw: Raw) -> str:
    whole = raw["ours"]["sid"]["whole"]
    their = [
        f"{t.upper()} {f['micro_steps']} x {f['micro_batch']}" for t, f in raw["s3prl"].items()
    ]
    return FAIRNESS.format(
        goal=f"The work is {whole['steps']:,} steps x {whole['rates']} learning rates",
        micro=", ".join(their),
        steps=", ".join(f"{task.upper()} {f['steps']:,}" for task, f in raw["ours"].items()),
        peak=f"{raw['encoder']['peak_flops'] / 1e9:,.0f} GFLOP/s",
    )


def _clock(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
