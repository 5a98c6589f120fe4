"""Speech that eSpeak NG makes here: a corpus anybody can have in two minutes, licence-free.

Not a stand-in for real speech: it exists so that the whole benchmark runs from a fresh clone. The
voices are rule-based, and so is the prosody: four rule sets, *not* emotions.

| part      | serves | target              | speakers (train/dev/test) | utterances        |
|-----------|--------|---------------------|---------------------------|-------------------|
| sentences | PR, ER | phones, prosody, text | 65 / 20 / 52, disjoint  | 1,300/200/780     |
| speakers  | SID    | speaker             | the same 60 in each       | 1,200/180/600     |
| digits    | ASR    | text                | 45 / 15 / 40, disjoint    | 540/90/240        |
| commands  | SF     | slots, text         | 45 / 15 / 40, disjoint    | 540/90/240        |
| pretrain  | -      | text                | 480, train only           | 7,200, about 10 h |

A speaker is an accent and a voice variant of the engine, with a pitch, a range, a rate and a
vocal-tract scale of its own. No accent-and-variant pair serves two parts (but digits and commands),
or two splits of disjoint speakers: above scale 1 the pairs of a split come again within it. What is
said may come again: of the 240 test strings of digits, `pretrain` speaks 112 too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from downstream.base import Example
from downstream.corpora.slots import marked
from downstream.corpora.speak import Line, engine
from upstream.common import PROJECT, disk
from upstream.common.errors import UserError, near_miss
from upstream.common.progress import progress
from upstream.common.schema import Amount, Natural

T = TypeVar("T")

VERSION = 1  # raise it when the same plan would sound different: old folders are then left alone
SHARD = 120  # utterances per engine process, the unit of resuming

ACCENTS = "en en-us en-us-nyc en-029 en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd"
# without the effects, and without six variants whose samples differ from process to process
VARIANTS = """Alex Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Mario
    Michael Mike Nguyen Reed RicishayMax RicishayMax2 RicishayMax3 Storm adam anika announcer
    antonio aunty belinda benjamin boris caleb david ed edward edward2 f1 f4 grandma
    grandpa gustave ian iven2 iven3 iven4 john kaukovalta linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo
    max michel miguel mike2 norbert pablo paul pedro quincy rob robert shelby steph steph2
    steph3 travis zac"""

# the grammar: 107 words
WORDS = {
    "name": "anna peter maria george helen oscar julia victor",
    "the": "the a this every that",
    "noun": """dog ship river teacher window garden horse letter castle doctor bridge child fox
        lake mountain village flower engine king table forest bird queen machine paper boat
        onion orange judge pie thumb shoe""",
    "adj": """old young green quiet bright heavy gentle royal strange small golden deep angry
        cheap huge thick loud smooth early brave""",
    "verb": """found watched carried followed painted moved called opened heard visited joined
        pushed chose measured washed sold fixed thanked drew lost""",
    "adv": "today again slowly outside together never there yesterday often alone",
    "prep": "near behind above under beyond with from through without before across along",
}
PATTERNS = (
    "the noun verb the noun",
    "name verb the adj noun",
    "the adj noun verb name adv",
    "name verb the noun adv",
    "the noun verb prep the noun",
    "adv name verb the noun",
)
COMMANDS = """call name, call name in the room, wake name at number number, set the room to number,
    play number times in the room"""
DIGITS = "zero one two three four five six seven eight nine"
SLOTS = {"name": WORDS["name"], "room": "kitchen cellar attic garage", "number": DIGITS}
ONSETS = "b d f g h j k l m n p r s t v w z ch sh th br dr fl gr kl pl sk sp st tr".split()
NUCLEI = "a e i o u ee oo ai oa ow oy ar er or".split()
CODAS = ["", "", "", *"b d g k l m n p s t z sh ch th ng nd nt st lk mp".split()]


# rule sets relative to the speaker: factors of pitch, range and rate, and dB of tilt and gain
PROSODY = {
    "flat": (0.95, 0.35, 1.0, 0, 0),
    "lively": (1.2, 1.6, 1.05, 1, 1),
    "slow-low": (0.75, 0.8, 0.84, -4, -2),
    "fast-loud": (1.1, 1.0, 1.2, 4, 2),
}


class Part(NamedTuple):
    speakers: dict[str, int]  # per split; one number under "all": the same speakers in each split
    each: dict[str, int]  # utterances per speaker and split
    targets: tuple[str, ...]
    pairs: slice  # of the shuffled accent-and-variant pairs: parts share none
    prosody: float = 1.0  # how strong the rule sets are, as an exponent of their factors


PARTS = {
    "sentences": Part(
        {"train": 65, "dev": 20, "test": 52},
        {"train": 20, "dev": 10, "test": 15},
        ("phones", "prosody", "text"),
        slice(0, 137),
        prosody=2.0,
    ),
    "speakers": Part(
        {"all": 60}, {"train": 20, "dev": 3, "test": 10}, ("speaker",), slice(137, 197)
    ),
    "digits": Part(
        {"train": 45, "dev": 15, "test": 40},
        {"train": 12, "dev": 6, "test": 6},
        ("text",),
        slice(197, 312),
    ),
    "pretrain": Part({"train": 480}, {"train": 15}, ("text",), slice(312, None)),
}
PARTS["commands"] = PARTS["digits"]._replace(targets=("slots", "text"))


class Planned(NamedTuple):
    """An utterance before it is spoken."""

    id: str
    split: str
    speaker: str
    prosody: str
    line: Line


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`; what rng.choice does, less the conversion of the list to an array."""
    return items[int(rng.integers(len(items)))]


def sentence(rng: np.random.Generator) -> str:
    """Four to six words of the 107-word grammar."""
    return " ".join(pick(rng, WORDS[kind].split()) for kind in pick(rng, PATTERNS).split())


def digits(rng: np.random.Generator) -> str:
    """Two to four digits, as words."""
    return " ".join(rng.choice(DIGITS.split(), rng.integers(2, 5)))


def command(rng: np.random.Generator) -> str:
    """Two to six words, some of them a name, a room or a number."""
    words = pick(rng, COMMANDS.split(",")).split()
    return " ".join(pick(rng, SLOTS[w].split()) if w in SLOTS else w for w in words)


def slots(text: str) -> str:
    """A command as marked text: `CALL B-name ANNA E-name`."""
    slot_of = {word: slot for slot, words in SLOTS.items() for word in words.split()}
    return marked(text, " ".join(slot_of.get(word, "O") for word in text.lower().split()))


def babble(rng: np.random.Generator) -> str:
    """Seven words, four of them invented, for the sounds and pairs of sounds the grammar lacks."""

    def syllable() -> str:
        return "".join(pick(rng, part) for part in (ONSETS, NUCLEI, CODAS))

    words = ["".join(syllable() for _ in range(rng.integers(1, 4))) for _ in range(4)]
    words += [pick(rng, WORDS[kind].split()) for kind in ("the", "prep", "noun")]
    return " ".join(rng.permutation(words))


def text_for(part: str, rng: np.random.Generator) -> str:
    """What is said in one utterance of `part`."""
    if part in ("digits", "commands"):
        return digits(rng) if part == "digits" else command(rng)
    if part == "pretrain":
        makers = (sentence, digits, babble)
        return ", ".join(makers[i](rng) for i in rng.choice(3, 2, p=[0.3, 0.1, 0.6]))
    return sentence(rng)


def cast(
    part: str, seed: int, scale: float
) -> Iterator[tuple[str, str, list[float], dict[str, int]]]:
    """The speakers: name, voice, [pitch, range, rate, tract] and utterances per split."""
    kind = PARTS[part]
    pairs = [f"{accent}+{variant}" for accent in ACCENTS.split() for variant in VARIANTS.split()]
    voices = list(np.random.default_rng(seed).permutation(pairs)[kind.pairs])
    rng = np.random.default_rng([seed, len(part), *part.encode()])
    names = (f"{part}-{index:03d}" for index in itertools.count())
    for split, count in kind.speakers.items():
        each = kind.each if split == "all" else {split: kind.each[split]}
        of_split, voices = voices[:count], voices[count:]
        for number in range(max(2, round(count * scale))):
            traits = list(rng.uniform([25, 30, 150, 0.88], [75, 70, 195, 1.14]))
            yield next(names), str(of_split[number % len(of_split)]), traits, each


def plan(part: str, seed: int = 0, scale: float = 1.0) -> list[Planned]:
    """Every utterance of `part`, decided before any is spoken: a pure function of its arguments."""
    power, planned = PARTS[part].prosody, []
    for who, (name, voice, (*traits, tract), each) in enumerate(cast(part, seed, scale)):
        for split, index in ((split, k) for split, count in each.items() for k in range(count)):
            stream = [seed, *part.encode(), who, *split.encode(), index]
            rng = np.random.default_rng(stream)
            style = pick(rng, list(PROSODY))
            *factors, tilt, gain = PROSODY[style]
            chance = np.exp(rng.normal(0, [0.14, 0.35, 0.09]))
            pitch, range_, rate = (t * f**power * c for t, f, c in zip(traits, factors, chance))
            line = Line(
                path=f"{name}-{split}-{index:03d}.flac",
                text=text_for(part, rng),
                voice=voice,
                pitch=float(np.clip(pitch, 0, 99)),
                range=float(np.clip(range_, 0, 99)),
                rate=float(rate),
                tract=tract,
                tilt=tilt * power + rng.normal(0, 3),
                gain=gain * power + rng.uniform(-4, 4),
                seed=stream,
            )
            planned.append(Planned(Path(line.path).stem, split, name, style, line))
    return planned


def _speak(folder: Path, shard: list[Planned], marker: Path) -> None:
    """Record one shard in a fresh engine process; its rows, the `marker`, are written last."""
    lines = [item.line._replace(path=str(folder / item.line.path)) for item in shard]
    done = subprocess.run(
        [sys.executable, "-m", "downstream.corpora.speak"],
        input=json.dumps(lines),
        capture_output=True,
        encoding="utf-8",
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"eSpeak NG failed on {marker}: {reason}; run it again to go on")
    rows = []
    for (*names, line), phones in zip(shard, json.loads(done.stdout)):
        row = dict(zip(Planned._fields, names), phones=" ".join(phones))
        row |= {"path": line.path, "text": line.text.upper()}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    disk.write(marker, "".join(rows))


def generate(root: Path, part: str, seed: int = 0, scale: float = 1.0) -> list[Path]:
    """Speak whatever of `part` is not there yet; return its shards' row files, in order.

    The folder's name holds a hash of the plan, so another seed, scale or grammar never mixes with
    what is there. Killed half-way, the same call goes on at the first missing shard.
    """
    planned = plan(part, seed, scale)
    digest = hashlib.sha256(json.dumps([VERSION, SHARD, planned]).encode()).hexdigest()[:8]
    folder = Path(root).absolute() / f"{part}-{digest}"
    shards = [planned[start : start + SHARD] for start in range(0, len(planned), SHARD)]
    markers = [folder / f"{index:04d}.jsonl" for index in range(len(shards))]
    if all(marker.exists() for marker in markers):
        return markers
    engine()  # a missing engine is reported here, once, and not by every worker
    with disk.lease(folder, wait=True), ThreadPoolExecutor(os.cpu_count()) as pool:
        missing = [index for index, marker in enumerate(markers) if not marker.exists()]
        jobs = [pool.submit(_speak, folder, shards[i], markers[i]) for i in missing]
        spoken = len(shards) - len(missing)
        try:
            for job in progress(as_completed(jobs), f"speaking {part}", len(shards), spoken):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return markers


def read(
    root: Path, target: str, *, part: str, seed: Natural = 0, scale: Amount = 1.0
) -> list[Example]:
    """The utterances of one `part`, spoken under `root` on first use (see the table above).

    `target` is one of the part's targets; `scale` multiplies the number of speakers per split
    (never below 2). Audio is 16 kHz 16-bit mono FLAC. Raises UserError for an unknown part or
    target, or without the engine.
    """
    if part not in PARTS:
        raise UserError(f"the synthetic corpus has no part {part!r}{near_miss(part, PARTS)}")
    targets = PARTS[part].targets
    if target not in targets:
        raise UserError(f"part {part!r} has no target {target!r}{near_miss(target, targets)}")
    examples = []
    for marker in generate(root, part, seed, scale):
        try:
            rows = [json.loads(line) for line in disk.read(marker).decode().split("\n") if line]
            for row in rows:
                who, path = (row["speaker"], row["split"]), str(marker.parent / row["path"])
                label = slots(row["text"]) if target == "slots" else row[target]
                example = Example(row["id"], path, None, None, label, *who)
                if not all(isinstance(text, str) for text in (example.id, label, *who)):
                    raise TypeError(example.id)
                examples.append(example)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{marker}: is damaged ({error!s:.60}); delete it") from error
    return examples
