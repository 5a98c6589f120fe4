"""What a manifest may say beside one label: several columns, slots, trials, turns, groups."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import recipe
from downstream.base import Example
from downstream.corpora import manifest, rttm
from downstream.corpora.slots import marked
from downstream.run.prepare import prepare
from downstream.tasks import trials
from tests.corpora import fault, wav
from tests.counting import calls
from upstream.common.errors import UserError
from upstream.common.schema import bind

ROWS = ["path|who|split|from|to|text|tags|a|b|lang"]
ROWS += ["audio/a.wav|s1|train|||play abba|O B-artist|on|light|de"]
ROWS += ["audio/b.wav|s2|dev|||play it|O O|off|light|de"]
ROWS += ["audio/c.wav|s2|dev|||x y|t t|off|lamp|fr"]
ROWS += ["audio/d.wav|s3|test|1.5|4|x|O|off|lamp|fr"]
ROWS += ["audio/e.wav|s4|dev test|||x|O|off|lamp|fr"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for letter in "abcdefgh":
        wav(tmp_path / "audio" / f"{letter}.wav")
    (tmp_path / "m.tsv").write_text("\n".join(ROWS).replace("|", "\t") + "\n")
    return tmp_path


def read(folder: Path, target: Any = None, **options: Any) -> list[Example]:
    options = {"file": "m.tsv", "speaker": "who", "start": "from", "end": "to", **options}
    options = bind(manifest.read, {"target": target, **options}, "corpus", ("root",))
    return manifest.read(folder, **options)


def put(folder: Path, name: str, *lines: str) -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return name


def change(folder: Path, old: str, new: str) -> Path:
    table = folder / "m.tsv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))
    return folder


# columns ----------------------------------------------------------------------------------------


def test_several_columns_are_one_target_and_groups_are_kept(folder: Path) -> None:
    examples = read(folder, ["a", "b", "lang"], group="lang")
    assert examples[0].target == "on ; light ; de"
    assert [e.group for e in examples] == ["de", "de", "fr", "fr", "fr"]
    assert [e.split for e in examples] == ["train", "dev", "dev", "test", "dev test"]
    assert read(folder, ["a"]) == read(folder, "a")


@pytest.mark.parametrize("value", ["on ; off", "on ;"])
def test_an_answer_that_looks_like_two_is_refused(folder: Path, value: str) -> None:
    change(folder, "\ton\tlight", f"\t{value}\tlight")
    assert "m.tsv:2: 'a' holds" in fault(read, folder, ["a", "b"])
    assert read(folder, "a")[0].target == value  # alone it is only text


@pytest.mark.parametrize(
    ("old", "new", "options", "part"),
    [
        ("\tde", "\t", {"group": "lang"}, "m.tsv:2: 'lang' is empty"),
        ("\tde", "\tde", {"group": "langage"}, "no column 'langage'; did you mean lang?"),
        ("\tlight", "\t", {"target": ["a", "b"]}, "m.tsv:2: 'b' is empty"),
        ("dev test", "train test", {}, "m.tsv:6: split 'train test': only dev and test"),
        ("dev test", "fold1 fold2", {}, "m.tsv:6: split 'fold1 fold2'"),
        ("dev test", "dev tset", {}, "m.tsv:6: unknown split 'tset'; did you mean test?"),
        ("\tde", "\tde", {"target": []}, "missing key 'target'"),
        ("\tde", "\tde", {"target": None}, "missing key 'target'"),
        ("\tde", "\tde", {"target": 3}, "must be"),
        ("\tde", "\tde", {"target": ["a", "z"]}, "no column 'z'"),
        ("\tde", "\tde", {"target": ["a", "b"], "tags": "tags"}, "one `target` column"),
        ("\tde", "\tde", {"rttm": "x"}, "leave target, tags and trials out"),
        ("\tde", "\tde", {"trials": []}, "at least one file"),
        ("\tde", "\tde", {"trials": "t", "split": None, "dev": 0.5}, "needs a column of splits"),
    ],
)
def test_one_clear_line(folder: Path, old: str, new: str, options: Any, part: str) -> None:
    line = fault(read, change(folder, old, new), **{"target": "a", **options})
    assert part in line, line


# slots ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tags", "target"),
    [
        ("play abba", "O B-artist", "PLAY B-artist ABBA E-artist"),
        ("a b c d", "B-x I-x O B-x", "B-x A B E-x C B-x D E-x"),
        ("a b c", "B-x B-x I-x", "B-x A E-x B-x B C E-x"),
        ("a b c", "I-x I-y O", "B-x A E-x B-y B E-y C"),
        ("a b c", "x x O", "B-x A B E-x C"),
        ("a b", "x y", "B-x A E-x B-y B E-y"),
        ("grüß dich", "O O", "GRÜSS DICH"),
    ],
)
def test_tags_become_marks(text: str, tags: str, target: str) -> None:
    assert marked(text, tags) == target


@given(st.lists(st.tuples(st.sampled_from(["a", "bc"]), st.sampled_from(["O", "x", "y-z"]))))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_marks_enclose_every_word_once(pairs: list[tuple[str, str]]) -> None:
    text = marked(" ".join(word for word, _ in pairs), " ".join(tag for _, tag in pairs))
    slot, found = "O", []
    for word in text.split():
        if word.startswith("B-"):
            assert slot == "O"
            slot = word[2:]
        elif word.startswith("E-"):
            assert slot == word[2:]
            slot = "O"
        else:
            found.append((word.lower(), slot))
    assert found == pairs and slot == "O"


@pytest.mark.parametrize(
    ("text", "tags", "part"),
    [
        ("play abba", "O", "1 tags for the 2 words"),
        ("play b-side", "O O", "'B-SIDE' looks like a slot's marker"),
        ("play abba", "O S-artist", "'S-artist' is neither O nor"),
        ("play abba", "artist B-artist", "'artist' is neither O nor"),
    ],
)
def test_tags_that_do_not_fit(folder: Path, text: str, tags: str, part: str) -> None:
    change(folder, "play abba\tO B-artist", f"{text}\t{tags}")
    line = fault(read, folder, "text", tags="tags")
    assert part in line and "m.tsv:2: 'tags'" in line


def test_tags_of_a_table(folder: Path) -> None:
    targets = [e.target for e in read(folder, "text", tags="tags")]
    assert targets[:3] == ["PLAY B-artist ABBA E-artist", "PLAY IT", "B-t X Y E-t"]


# trials -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["1 {} {}", "target\t{}\t{}", "{} {} 1", "{} {} target"])
@pytest.mark.parametrize("name", ["audio/{}", "audio/{}.wav"])
def test_trials_stand_with_their_first_utterance(folder: Path, form: str, name: str) -> None:
    first, second = (form.format(name.format(a), name.format(b)) for a, b in ("bc", "be"))
    files = [put(folder, "dev.txt", first, "", second), put(folder, "t.txt", "0 audio/e audio/e2")]
    change(folder, "audio/d.wav\ts3\ttest\t1.5\t4", "audio/f.wav\ts3\tdev\t\t")
    put(folder, "t.txt", "0 audio/f audio/e")
    examples = {e.id[-1]: e for e in read(folder, "who", trials=files)}
    assert examples["a"].target == "s1"
    assert trials.read(examples["b"].target) == [(1, "audio/c"), (1, "audio/e")]
    assert trials.read(examples["f"].target) == [(0, "audio/e")]
    assert trials.read(examples["c"].target) == trials.read(examples["e"].target) == []


def test_documents_need_no_trial_and_nothing_a_target(folder: Path) -> None:
    file = put(folder, "t.txt", "1 audio/b audio/c")
    line = fault(read, folder, "who", trials=file)
    assert "m.tsv:5: 'audio/d:1.5-4.0' of test is in no trial" in line and "documents" in line
    examples = read(folder, "who", trials=file, documents=True)
    assert [trials.read(e.target) for e in examples[1:]] == [[(1, "audio/c")], [], [], []]
    change(folder, "audio/a.wav\ts1\ttrain", "audio/a.wav\ts1\ttest")
    assert len(read(folder, trials=file, documents=True)) == 5


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["1 audio/b audio/z"], "t.txt:1: 'audio/z' is no utterance of the table"),
        (["1 audio/b audio/cc"], "did you mean audio/"),
        (["1 audio/b audio/c", "0 audio/b audio/c"], "t.txt:2: this pair is already listed"),
        (["1 audio/b audio/c", "0 audio/c audio/b"], "t.txt:2: this pair has another label"),
        (["1 audio/b audio/d"], "t.txt:1: a trial across splits"),
        (["1 audio/e audio/b"], "t.txt:1: a trial across splits"),
        (["1 audio/a audio/b"], "t.txt:1: 'audio/a' is of train"),
        (["1 audio/b audio/b"], "t.txt:1: 'audio/b' is compared with itself"),
        (["audio/b audio/c"], "t.txt:1: 'audio/b audio/c' is not `label first second`"),
        (["1 audio/b audio/c 1"], "t.txt:1:"),
        (["1 1 1"], "t.txt:1:"),
        (["2 audio/b audio/c"], "t.txt:1:"),
        (["yes\taudio/b\taudio/c"], "t.txt:1:"),
        ([""], "t.txt: holds no trials"),
    ],
)
def test_trials_that_cannot_be(folder: Path, lines: list[str], part: str) -> None:
    change(folder, "\t1.5\t4\t", "\t\t\t")
    file = put(folder, "t.txt", *lines)
    line = fault(read, folder, "who", trials=file, documents=True)
    assert part in line, line


def test_a_name_of_two_parts_is_refused(folder: Path) -> None:
    change(folder, "audio/c.wav\ts2\tdev\t\t", "audio/d.wav\ts2\tdev\t0\t1")
    file = put(folder, "t.txt", "1 audio/b audio/d")
    line = fault(read, folder, "who", trials=file, documents=True)
    assert "'audio/d' is several utterances (audio/d:0.0-1.0, audio/d:1.5-4.0)" in line


def test_training_rows_keep_their_target(folder: Path) -> None:
    change(folder, "\ton\tlight", "\t\tlight")
    file = put(folder, "t.txt", "1 audio/b audio/c")
    line = fault(read, folder, "a", trials=file, documents=True)
    assert "m.tsv:2: this training utterance has no target" in line


# turns ------------------------------------------------------------------------------------------


def speaker(name: str, start: object, duration: object, who: str) -> str:
    return f"SPEAKER {name} 1 {start} {duration} <NA> <NA> {who} <NA> <NA>"


TURNS = [
    ";; made up",
    "SPKR-INFO d 1 <NA> <NA> <NA> unknown anna <NA> <NA>",
    speaker("d", 0, 2, "anna"),
    speaker("d", 3.5, 2, "ben"),
    speaker("d", 1.75, 1.25, "anna"),
    speaker("d", 5, 1, "anna"),
    speaker("d", 2, 0, "carl"),
    speaker("audio/a", 0.1, 0.2, "böll"),
]


def test_turns_are_of_the_part_and_merged(folder: Path) -> None:
    examples = read(folder, rttm=put(folder, "all.rttm", *TURNS))
    targets = {e.id: json.loads(e.target) for e in examples}
    assert targets["audio/d:1.5-4.0"] == [["anna", 0.0, 1.5], ["ben", 2.0, 2.5]]
    assert targets["audio/a"] == [["böll", 0.1, 0.3]]
    assert targets["audio/b"] == targets["audio/c"] == []
    (folder / "turns").mkdir()
    put(folder / "turns", "d.rttm", *TURNS[:-1])
    put(folder / "turns", "a.rttm", TURNS[-1])
    assert read(folder, rttm="turns") == examples
    (folder / "none").mkdir()
    assert "holds no *.rttm" in fault(read, folder, rttm="none")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (speaker("d", -1, 2, "x"), "all.rttm:1: the start is '-1', not a time in seconds"),
        (speaker("d", 1, "nan", "x"), "all.rttm:1: the duration is 'nan'"),
        (speaker("d", "inf", 1, "x"), "all.rttm:1: the start is 'inf'"),
        (speaker("d", 1, 1e300, "x"), "all.rttm:1: no recording is that long"),
        (speaker("d", "1,5", 2, "x"), "all.rttm:1: the start is '1,5'"),
        ("SPEAKER d 1 0 1", "all.rttm:1: 'SPEAKER d 1 0 1' is not `SPEAKER"),
        ("SPEAKR d 1 0 1 <NA> <NA> x <NA> <NA>", "all.rttm:1:"),
        (speaker("dd", 0, 1, "x"), "turns of 1 recordings that are not in the table"),
        ("", "holds no turns"),
    ],
)
def test_turns_that_cannot_be(folder: Path, line: str, part: str) -> None:
    assert part in fault(read, folder, rttm=put(folder, "all.rttm", line))


def test_two_files_of_one_name(folder: Path) -> None:
    wav(folder / "audio2" / "d.wav")
    change(folder, "audio/c.wav", "audio2/d.wav")
    file = put(folder, "all.rttm", *TURNS)
    assert "m.tsv:5: the recording 'd'" in fault(read, folder, rttm=file)
    turns = [line.replace("SPEAKER d ", "SPEAKER audio/d ") for line in TURNS]
    read(folder, rttm=put(folder, "all.rttm", *turns))


def test_turns_agree_with_a_slow_way(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(20):
        lines, grid = [], {who: [False] * 1000 for who in "abc"}  # hundredths of a second
        for _ in range(12):
            who, start, length = rng.choice("abc"), rng.randrange(900), rng.randrange(1, 100)
            grid[who][start : start + length] = [True] * length
            lines.append(speaker("r", start / 100, length / 100, who))
        file = tmp_path / put(tmp_path, "r.rttm", *lines)
        spans = rttm.merged(rttm._recordings([file])["r"])
        first, last = rng.randrange(400), rng.randrange(500, 1000)
        found = {who: [False] * (last - first) for who in "abc"}
        for who, start, end in rttm.within(spans, first / 100, last / 100):
            for i in range(round(100 * start), round(100 * end)):
                assert not found[who][i]
                found[who][i] = True
        assert found == {who: row[first:last] for who, row in grid.items()}


def test_twice_the_turns_are_twice_the_work(folder: Path) -> None:
    """Seconds are measured by tests/bench/tables.py."""
    block = "".join(speaker("d", i / 2, 0.4, f"s{i % 7}") + "\n" for i in range(1_000))
    work = []
    for times in (2, 4):
        (folder / "all.rttm").write_text(block * times)
        work.append(calls(lambda: read(folder, rttm="all.rttm")))
    assert work[1] < 2.1 * work[0]


# hostile files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["trials", "rttm", "file"])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "is a pipe or a device"),
        (b"1 audio/b \xff\xfe", "is not UTF-8 text"),
        (b"\0" * 100, ""),
        (b"x " * 100_000, ""),
        (b"1\taudio/b\t../../../../etc/passwd\n", ""),
        (b'{"a": ' * 100_000, ""),
        (b'{"path": ' + b"1" * 5000 + b"}", ""),
    ],
)
def test_hostile_files_are_one_line(
    folder: Path, key: str, content: bytes | None, part: str
) -> None:
    name = "odd.jsonl" if key == "file" else "odd.txt"
    os.mkfifo(folder / name) if content is None else (folder / name).write_bytes(content)
    target = None if key == "rttm" else "who"
    line = fault(read, folder, target, **{key: name})
    assert part in line and len(line) < 1500, line


def test_a_wide_table_is_read_and_a_path_with_a_break_is_one_line(folder: Path) -> None:
    names = ["path", "text", "split", *(f"c{i}" for i in range(10_000))]
    row = ["audio/a.wav", "HI", "train", *"x" * 10_000]
    put(folder, "wide.tsv", "\t".join(names), "\t".join(row))
    assert len(manifest.read(folder, "text", file="wide.tsv")) == 1
    assert "no column 'txt'" in fault(manifest.read, folder, "txt", file="wide.tsv")
    put(folder, "m.csv", "path,text,split", '"a\nb.wav",HI,train')
    assert r"a\nb.wav" in fault(manifest.read, folder, "text", file="m.csv")


# what the tasks make of it ----------------------------------------------------------------------

SPLITS = ("train", "dev", "test")
PAIRS = '{"trials": [[0, "audio/c"], [1, "audio/d"]]}'


@pytest.mark.parametrize(
    ("task", "corpus", "target"),
    [
        ("ic", {"target": ["a", "b"]}, "off ; light"),
        ("sf", {"target": "text", "tags": "tags"}, "B-t X Y E-t"),
        ("asv", {"target": "who", "trials": ["t.txt", "u.txt"]}, PAIRS),
        ("qbe", {"trials": ["t.txt", "u.txt"], "documents": True}, PAIRS),
        ("sd", {"rttm": "all.rttm", "start": "from", "end": "to"}, '[["b", 0.0, 0.004]]'),
    ],
)
def test_every_task_understands_its_targets(
    folder: Path, task: str, corpus: dict[str, Any], target: str
) -> None:
    rows = [ROWS[0]]
    rows += ["audio/a.wav|s1|train|||play it x y|O B-t O O|off|light|de"] * (task != "qbe")
    rows += ["audio/b.wav|s2|dev|||x y|t t|off|light|de"]
    rows += [
        "audio/c.wav|s2|dev|||play|O|off|light|fr",
        "audio/d.wav|s3|dev|||x|t|off|light|fr",
    ]
    rows += [f"audio/{name}.wav|s4|test|||x|O|off|light|fr" for name in "efg"]
    put(folder, "m.tsv", *(row.replace("|", "\t") for row in rows))
    put(folder, "t.txt", "0 audio/b audio/c", "1 audio/b audio/d.wav")
    put(folder, "u.txt", "audio/e audio/f target", "audio/e audio/g nontarget")
    put(folder, "all.rttm", speaker("b", 0, 0.004, "b"), speaker("d", 0.001, 0.004, "b"))
    content: dict[str, Any] = {"kind": "task", "task": task}
    content["corpus"] = {
        "name": "manifest", "root": str(folder), "file": "m.tsv", "speaker": "who",
        "group": "lang", **corpus,
    }  # fmt: skip
    if task != "qbe":
        content["train"] = {"steps": 1, "batch": 1, "lr": [0.1], "eval_every": 1}
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    prepared = prepare(recipe.load(folder / "task.yaml"), folder / "results")
    chosen = {item.id: item for item in prepared.items}
    item = chosen["audio/b"]
    assert item.target == target and item.group == "de"
    # the files of this folder are the same 10 ms of silence, trials are of any two
    doubts = ("same audio", "near silent", "CTC cannot align", "trials contradict")
    assert not [w for w in prepared.warnings if not any(words in w for words in doubts)]


@pytest.mark.parametrize(
    "key", ["target", "path", "id", "group", "tags", "trials", "rttm", "split"]
)
def test_any_option_may_be_nonsense(folder: Path, key: str) -> None:
    values: list[Any] = [
        None,
        True,
        -1,
        "",
        "x",
        "..",
        "/",
        "\0",
        "\ud800",
        "é" * 300,
        [],
        [""],
        {},
    ]
    values += ["text", ["text", "a"], ["text", "text"], "path", "m.tsv", ["m.tsv"]]
    for value in values:
        for more in ({}, {"target": None}):
            options = {"target": "text", **more, key: value}
            try:
                read(folder, **options)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500, value


def test_turns_behind_the_end_of_the_audio_are_another_recordings(folder: Path) -> None:
    put(folder, "m.tsv", "path\tsplit", *(f"audio/{x}.wav\t{s}" for x, s in zip("abc", SPLITS)))
    corpus = {"name": "manifest", "root": str(folder), "file": "m.tsv", "rttm": "all.rttm"}
    train = {"steps": 1, "batch": 1, "lr": [0.1], "eval_every": 1}
    content = {"kind": "task", "task": "sd", "corpus": corpus, "train": train}
    (folder / "task.yaml").write_text(yaml.safe_dump(content))
    turns = [speaker(name, 0, 0.01, "x") for name in "abc"]
    put(folder, "all.rttm", *turns, speaker("c", 0, 0.4, "x"))
    prepare(recipe.load(folder / "task.yaml"), folder / "results")
    put(folder, "all.rttm", *turns, speaker("c", 7, 2, "x"))
    line = fault(prepare, recipe.load(folder / "task.yaml"), folder / "results")
    assert "test: audio/c: speech until 9 s in 0.01 s of audio" in line
