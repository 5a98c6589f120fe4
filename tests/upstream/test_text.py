"""What cannot be seen is shown, formulas are marked, and paths of this machine are left out."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from downstream.report import share
from downstream.report.layout import as_csv, latex, markdown, plain, text
from upstream.common import PROJECT
from upstream.common.text import escaped, escaped_output, portable, read_name

HOSTILE = ["\x1b[2J", "\x9b31m", "a\u202eb", "a\u2028b", "a\u2066b", "\ud83d", "a\x00b", "a\u200bb"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_seen_is_shown_in_every_form(name: str) -> None:
    shown = escaped(name)
    assert shown.isprintable() and "\\" in shown and read_name(name, "name") == shown
    table = [["upstream", "x"], [name, name]]
    for form in (text(table), markdown(table), as_csv(["a"], [[name]])):
        assert name not in form and shown in form
    assert name not in latex(table, [name])
    assert json.loads(share.as_json({"a": "\u202e\x9b"})) == {"a": "\u202e\x9b"}
    assert "\u202e" not in share.as_json({"a": "\u202e"})


def test_letters_of_all_languages_stay() -> None:
    for name in ("نموذج الكلام", "语音模型 🎉", "e\u0301", "merged:alpha=[0.1,0.5]", "क्‍ष"):
        assert escaped(name) == name


def test_a_terminal_is_not_steered(capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        print("\x1b]0;title\x07 ok\tok")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 ok\tok\n"


def test_formulas_are_marked_and_numbers_stay_numbers() -> None:
    formulas = ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "-", "+a"]
    numbers = ["-4.45", "+0.31", "-1e-05", "-.5", "+1"]
    cells = as_csv(["a"], [[x] for x in (*formulas, *numbers, -4.45)])
    rows = list(csv.reader(io.StringIO(cells)))
    values = [value for (value,) in rows[1:]]
    assert all(value.startswith(("'", "\\")) for value in values[: len(formulas)])
    assert values[len(formulas) :] == [*numbers, "-4.45"]


def test_markdown_holds_no_html_and_no_link() -> None:
    assert "<script" not in plain("<script>x</script>") and "<img" not in plain("<img src=x>")
    assert plain("[a](javascript:alert(1))") == "[a\\](javascript:alert(1))"
    assert plain("p <.001 [+0.1, 0.2]") == "p <.001 [+0.1, 0.2]"


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("/home/mary/model", "model"),
        ("hf:/home/mary/model:padding=s3prl", "hf:model:padding=s3prl"),
        ("/scratch/mary/my runs/x.yaml:TASK", "x.yaml:TASK"),
        ("--base /home/mary/a --tuned '/data/b'", "--base a --tuned 'b'"),
        (f"{PROJECT}/recipes/demo/asr.yaml", "recipes/demo/asr.yaml"),
        (os.path.expanduser("~/speech data/x"), "speech data/x"),
        ("../shared/speech", "../shared/speech"),
        ("$AUDIO/x/y", "$AUDIO/x/y"),
        ("https://arxiv.org/abs/2502.12672", "https://arxiv.org/abs/2502.12672"),
        ("facebook/hubert-base-ls960", "facebook/hubert-base-ls960"),
        ("wer/worst, 0.1/0.5, a / b", "wer/worst, 0.1/0.5, a / b"),
    ],
)
def test_paths_of_this_machine_are_left_out(path: str, short: str) -> None:
    assert portable(path) == short
    assert portable({"a": [path, 1, None]}) == {"a": [short, 1, None]}


def test_what_lies_in_the_results_stays_findable(tmp_path: Path) -> None:
    place = tmp_path / "results" / "upstreams" / "merged@0"
    assert portable(str(place), tmp_path / "results") == "upstreams/merged@0"
