"""The page and its figures: what they say, what they must not do, and a browser that looks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from downstream.report import curves, page
from downstream.report.figures import gain
from downstream.report.layers import layer_weights
from downstream.report.lineage import likely_base, lineages
from downstream.report.results import load_results
from tests.downstream.test_table import TASKS, put
from upstream.common import PROJECT, disk
from upstream.common.errors import UserError
from upstream.measures import Estimate
from upstream.similarity import Similarity, similarities

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)></svg></style>",
    "x" * 300,
    "نموذج الكلام",
    "语音模型 🎉",
    "javascript:alert(3)\u202e\x07]]>-->",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def merged(root: Path, alpha: float, base: str = "b00000000000") -> str:
    """A folder with the record of a merge, and of the fine-tuned upstream that it came from."""
    tuned = root / "upstreams" / "finetune@1"
    record: dict[str, Any] = {
        "recipe": {"task": "er.yaml"}, "base_fingerprint": base, "fingerprint": "t00000000000",
        "seconds": 60.0, "peak_memory_bytes": 2e9, "stored_bytes": 4e6,
    }  # fmt: skip
    disk.write(tuned / "finetune.json", json.dumps(record))
    place = root / "upstreams" / f"merged@{alpha}"
    record = {
        "recipe": {"only": None}, "method": "linear", "params": {"alpha": alpha},
        "base_fingerprint": base, "tuned": [str(tuned)], "seconds": 1.0,
        "fingerprints": {"tuned": ["t00000000000"]},
    }  # fmt: skip
    disk.write(place / "merge.json", json.dumps(record))
    return str(place)


def sourced(root: Path, upstream: str, source: str) -> None:
    for path in root.glob("*@*/*/*@*/seed*/score.json"):
        content = json.loads(path.read_text())
        if content["cell"]["upstream"] == upstream:
            content["result"]["source"] = source
            path.write_text(json.dumps(content))


def alike(root: Path) -> None:
    """A similarity of two upstreams, and a file that is none."""
    row = [Estimate(1 - i / 9, 0.9 - i / 9, 1.1 - i / 9) for i in range(3)]
    found = Similarity(
        reference="base", other=HOSTILE[0], fingerprints=["b" * 12, "c" * 12], corpus="demo: er",
        audio="a" * 12, utterances=9, frames=99, unit="speakers", units=9,
        layers=[[i, i] for i in range(3)], measures={"cka": row}, mean={"cka": row[0]},
        floor={"cka": row[::-1]}, weights={"all": 0.1},
    )  # fmt: skip
    disk.write_checked(root / "similarity" / "one.json", asdict(found))
    (root / "similarity" / "two.json").write_text("{")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a base, a curve of alphas and upstreams with hostile names."""
    root = tmp_path_factory.mktemp("page")
    rates = {"base": 0.30, "merged:alpha=0.25": 0.18, "merged:alpha=1": 0.42}
    rates |= {name: 0.2 + i / 50 for i, name in enumerate(HOSTILE)}
    for number, (upstream, rate) in enumerate(rates.items()):
        prints = f"{upstream[0]}{'0' * 11}" if number < 3 else f"{number:012d}"
        if number in (1, 2):
            prints = f"{number}{'0' * 11}"
        for task in TASKS:
            for seed in range(3):
                put(root, upstream, task, seed, rate, fingerprint=prints)
    sourced(root, "merged:alpha=0.25", merged(root, 0.25))
    sourced(root, "merged:alpha=1", merged(root, 1.0))
    for number, path in enumerate(sorted(root.glob("b*@*/*/er@*/seed*"))):
        weights = np.array([0.0, np.log(2.0), -40.0 if number == 0 else np.log(2.0)])
        save_file({"layer_weights": weights.astype("float32")}, path / "head.safetensors")
    for path in root.glob("b*@*/*/sid@*/seed0"):
        (path / "head.safetensors").write_bytes(b"no head")
    alike(root)
    return root


@pytest.fixture(scope="module")
def written(root: Path) -> Path:
    output = root / page.NAME
    page.write(output, load_results(root), similarities(root), folder=root / "figures")
    return output


class Reader(HTMLParser):
    """Every tag, and all text outside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def test_page_says_what_the_table_says_and_escapes_every_name(root: Path, written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    read = Reader(text)
    tags = [tag for tag, _ in read.tags]
    assert tags.count("script") == 1 and not {"img", "iframe", "object", "form"} & set(tags)
    for tag, attributes in read.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert "src" not in attributes
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in HOSTILE[:5]:
        assert name in read.text
    assert "\x07" not in text
    view = page.view("demo", load_results(root))
    assert view.reference == "base", "what the merges grew from"
    scores = [row for row in view.table.rows if not row.reference]
    assert len(scores) == 9 * 4
    for row in scores:
        assert f"{row.score:.2f} ±{row.score - row.low:.2f}" in read.text
    for section in ("Scores", "Minus base", "Differences", "Across tasks", "Along α", "Layer wei",
                    "Fine-tuned on er", "Hidden states against", "Cost", "Provenance"):  # fmt: skip
        assert section in read.text
    assert "61.0 s" in read.text, "fine-tuning and merging"
    assert "--upstream 'javascript:alert(3)" in read.text
    assert len(text.encode()) < 2e6


def test_same_results_same_bytes(root: Path, written: Path, tmp_path: Path) -> None:
    written_again = page.write(
        tmp_path / "again.html", load_results(root), similarities(root), folder=tmp_path / "figures"
    )
    assert written_again[0].read_bytes() == written.read_bytes()
    names = sorted(path.name for path in written_again[1:])
    assert names == sorted(path.name for path in (root / "figures").iterdir())
    assert {name.split(".")[0] for name in names} >= {"demo-differences", "demo-front"}
    for name in names:
        made = (root / "figures" / name).read_bytes()
        assert made[:4] in (b"%PDF", b"<svg")
        again = (tmp_path / "figures" / name).read_bytes()  # vl-convert orders PDF objects anew
        assert made == again or (name.endswith(".pdf") and len(made) == len(again)), name


def test_the_curve_of_alphas_is_the_paired_differences(root: Path) -> None:
    results = load_results(root)
    known = lineages(results)
    assert {n[0]: of.alpha for n, of in known.items()} == {
        "merged:alpha=0.25": 0.25, "merged:alpha=1": 1.0,
    }  # fmt: skip
    assert likely_base(results) == "base@b00000000000"
    view = page.view("demo", results)
    curve, front = view.figures()["alpha"]
    rows = {(r.upstream, r.task): r for r in view.table.rows if r.reference == "base"}
    values = curve.panels[1].to_dict(validate=False)["data"]["values"]  # er
    assert [(v["alpha"], v["y"]) for v in values] == [
        (0.0, 0.0),
        (0.25, rows["merged:alpha=0.25", "er"].difference),
        (1.0, rows["merged:alpha=1", "er"].difference),
    ]
    spec = json.dumps(front.panels[0].to_dict(validate=False))
    others = [gain(rows["merged:alpha=1", task]) for task in ("asr", "pr", "sid")]
    assert f'"x": {gain(rows["merged:alpha=1", "er"])}' in spec
    assert f'"y": {sum(others) / 3}' in spec


def test_moved_results_keep_their_curve(root: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    for path in moved.rglob("score.json"):
        path.write_text(path.read_text().replace(str(root), "/nowhere"))
    for path in moved.rglob("merge.json"):
        path.write_text(path.read_text().replace(str(root), "/nowhere"))
    found = {name: of.seconds for (name, _), of in lineages(load_results(moved)).items()}
    assert found == {"merged:alpha=0.25": 61.0, "merged:alpha=1": 61.0}


def test_gain_is_the_share_of_errors_that_went(root: Path) -> None:
    rows = page.view("demo", load_results(root)).table.rows
    row = next(r for r in rows if r.reference)._replace(reference_score=80.0, difference=5.0)
    assert gain(row._replace(better="higher")) == pytest.approx(25)
    assert gain(row._replace(better="lower")) == pytest.approx(-6.25)
    assert np.isnan(gain(row._replace(better="lower", reference_score=0.0)))


def test_layer_weights_are_the_softmax_of_what_is_kept(root: Path) -> None:
    view = page.view("demo", load_results(root))
    (found,) = layer_weights(view.results, view.called)  # sid's head is no head
    assert (found.upstream, found.task, found.heads) == ("base", "er", 3)
    mean, low, high = found.shares[0]
    assert (low, high) == pytest.approx((1 / 5, 1 / 3))
    assert mean == pytest.approx((1 / 3 + 2 / 5) / 3)


def test_what_is_not_there_is_left_out_or_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results here; run the benchmark"):
        page.write(tmp_path / "p.html", [])
    put(tmp_path, "lonely", "er", 0, 0.3)
    results = load_results(tmp_path)
    page.write(tmp_path / "p.html", results)
    text = (tmp_path / "p.html").read_text()
    assert "--reference UPSTREAM" in text and "merged:alpha=0,0.1" in text
    assert "<figure" not in text
    with pytest.raises(UserError, match="no results in suite 'dmo'; did you mean demo"):
        page.write(tmp_path / "p.html", results, suite="dmo")
    with pytest.raises(UserError, match="did you mean lonely"):
        page.write(tmp_path / "p.html", results, references=["lonly"])
    for record in ("{", "[]", '{"recipe": 1}', '{"params": {}, "tuned": 7, "recipe": {}}'):
        place = tmp_path / "made"
        disk.write(place / "merge.json", record)
        sourced(tmp_path, "lonely", str(place))
        assert lineages(load_results(tmp_path)) == {}


def test_a_foreign_suite_writes_no_figure_elsewhere(tmp_path: Path) -> None:
    for upstream in ("base", "other"):
        put(tmp_path / "r", upstream, "er", 0, 0.3, suite="../../<b>")
    results = load_results(tmp_path / "r")
    written = page.write(tmp_path / "p.html", results, (), ["base"], folder=tmp_path / "f")
    assert {path.parent for path in written[1:]} == {tmp_path / "f"} and len(written) > 1
    assert "--suite &#x27;PATH/TO/../../&lt;b&gt;&#x27; " in written[0].read_text()


DAMAGED: dict[str, object] = {
    "created": None, "git": "x", "recipe": [], "warnings": 3, "seconds": "1", "source": None,
}  # fmt: skip


@pytest.mark.parametrize("key, value", DAMAGED.items())
def test_a_damaged_cell_is_named(tmp_path: Path, key: str, value: object) -> None:
    put(tmp_path, "base", "er", 0, 0.3)
    (path,) = tmp_path.glob("*@*/*/*@*/seed0/score.json")
    content = json.loads(path.read_text())
    content["result"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"score.json cannot be read.*{key} is"):
        load_results(tmp_path)


def test_a_changed_key_stands_in_the_command(tmp_path: Path) -> None:
    put(tmp_path, "base", "er", 0, 0.3)
    (path,) = tmp_path.glob("*@*/*/*@*/seed0/score.json")
    content = json.loads(path.read_text())
    content["result"]["recipe"] = {"task": "er", "train": {"steps": 777, "batch": 256}}
    path.write_text(json.dumps(content))
    page.write(tmp_path / "p.html", load_results(tmp_path))
    wanted = (
        "benchmark.py --upstream base --suite demo --downstream er --seeds 1 --set train.steps=777<"
    )
    assert wanted in (tmp_path / "p.html").read_text()


def test_without_what_draws_one_line_says_so(tmp_path: Path) -> None:
    put(tmp_path, "base", "er", 0, 0.3)
    code = (
        "import sys; sys.modules['altair'] = None; import benchmark\n"
        f"sys.exit(benchmark.main(['report', '--results', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install -e '.[report]'" in done.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        assert not os.environ.get("CI"), "CI looks at the page: install chromium"
        pytest.skip("no chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("script", [True, False], ids=["script", "plain"])
def test_in_a_browser(written: Path, browser: Any, width: int, script: bool) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, java_script_enabled=script
    )
    seen, said = list[str](), list[str]()
    tab = context.new_page()
    tab.on("request", lambda request: seen.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.goto(written.as_uri())
    assert [url for url in seen if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in seen if url.startswith("file:")]) == 1
    box = tab.locator("body").bounding_box()
    assert box["width"] <= width
    assert tab.locator("figure svg").first.is_visible()
    assert tab.locator("figure svg").count() >= 10
    assert tab.locator("tbody tr").first.is_visible()
    if script:
        wide = "document.documentElement.scrollWidth"
        assert tab.evaluate(wide) <= width
        table = tab.locator("table.sorts").first
        column = "rows => rows.map(r => +r.cells[2].getAttribute('data-v'))"
        button = table.locator("thead button").nth(2)
        button.focus()
        tab.keyboard.press("Enter")
        up = table.locator("tbody tr").evaluate_all(column)
        button.click()
        down = table.locator("tbody tr").evaluate_all(column)
        assert up == sorted(up) and down == up[::-1] and len(set(up)) > 3
        assert table.locator("th[aria-sort=descending]").count() == 1
        text = table.locator("tbody").inner_text()
        assert HOSTILE[0] in text and HOSTILE[3] in text
        fetched = tab.evaluate("fetch('https://example.org').then(() => 'yes', () => 'no')")
        assert fetched == "no"
        said = [line for line in said if "example.org" not in line]
    assert said == []
    context.close()


def test_many_upstreams_stay_readable(tmp_path: Path) -> None:
    for number in range(60):
        for task in ("er", "sid"):
            put(tmp_path, f"u{number}", task, 0, 0.3, fingerprint=f"{number:012d}")
    results = load_results(tmp_path)
    view = page.view("demo", results, ["u0"])
    drawn = [f for figures in view.figures().values() for f in figures]
    assert drawn[0].left_out == "Not drawn: 19 more upstreams; see the table. "
    rows = drawn[0].panels[0].to_dict(validate=False)["layer"][1]["data"]["values"]
    assert len({row["name"] for row in rows}) == 40
    page.write(tmp_path / "p.html", results, references=["u0"])
    text = (tmp_path / "p.html").read_text()
    assert len(re.findall("<bdi>u59</bdi>", text)) >= 3, "the tables have all"
    assert len(text) < 2e6


def test_names_that_look_alike_when_cut_stay_apart() -> None:
    from downstream.report.figures import LONGEST, short_names

    names = ["a" + "x" * 40, "b" + "x" * 40, "short", "x" * 50 + "a" + "x" * 50, "x" * 101]
    short = short_names(names)
    assert len(set(short.values())) == 5 and short["short"] == "short"
    assert short[names[0]].startswith("ax") and short[names[1]].startswith("bx")
    (cut,) = short_names(["folder/" * 9 + "end"]).values()
    assert cut[0] == "…" and cut.endswith("folder/folder/end") and len(cut) == LONGEST
    assert curves.BARE not in short.values()
