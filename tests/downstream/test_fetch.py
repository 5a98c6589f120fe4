"""Corpora of a suite from a server that may send anything; what is left when it does."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmark
from downstream import fetch as module
from downstream.fetch import fetch, load
from tests.corpora import fault, wav
from tests.web import Server, serve
from upstream.common import disk, download

TASK = """
kind: task
task: classify
corpus: {name: manifest, root: $CORPORA_HERE/tones, target: tone, dev: 0.2, test: 0.2}
train: {steps: 1, batch: 1, lr: [1.0], eval_every: 1}
"""
RECIPE = """
kind: fetch
variable: CORPORA_HERE
corpora:
  tones:
    url: {url}
    licence: public domain
    cite: nobody
    megabytes: 1
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    yield from serve()


@pytest.fixture
def suite(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORPORA_HERE", "")  # fetch sets it
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "tone.yaml").write_text(TASK)
    (tmp_path / "suite" / "fetch.yaml").write_text(RECIPE.format(url=server.url))
    return tmp_path / "suite"


@pytest.fixture
def corpus(tmp_path: Path) -> bytes:
    """A zip as GitHub makes them: everything in one folder."""
    wav(tmp_path / "a.wav")
    rows = [f"{i}.wav\t{i % 2}" for i in range(10)]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("tones-1.0/manifest.tsv", "\n".join(["path\ttone", *rows]) + "\n")
        for number in range(10):
            file.writestr(f"tones-1.0/{number}.wav", (tmp_path / "a.wav").read_bytes())
    return packed.getvalue()


def with_digest(suite: Path, digest: str) -> None:
    text = (suite / "fetch.yaml").read_text()
    (suite / "fetch.yaml").write_text(f"{text}    sha256: {digest}\n")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lease"}


def test_a_suite_is_fetched_noted_and_read(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda request: request.reply(200, corpus)
    output = tmp_path / "out"
    assert benchmark.main(["fetch", str(suite), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    digest = hashlib.sha256(corpus).hexdigest()
    assert said.index("public domain") < said.index("SHA-256") and digest in said
    assert "tone: 10 utterances of 10 speakers" in said
    assert f"export CORPORA_HERE={output}" in said
    assert left(output) == {"tones", "tones.fetched.json"}
    assert disk.read_checked(output / "tones.fetched.json") == {
        "url": server.url, "sha256": digest, "bytes": len(corpus)
    }  # fmt: skip
    fetch(str(suite), output)
    assert len(server.asked) == 1 and "is there already" in capsys.readouterr().out


def test_the_variable_says_where(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--output FOLDER, or export CORPORA_HERE=FOLDER" in fault(fetch, str(suite), None)
    server.answer = lambda request: request.reply(200, corpus)
    monkeypatch.setenv("CORPORA_HERE", str(tmp_path / "here"))
    fetch(str(suite), None)
    assert (tmp_path / "here" / "tones" / "0.wav").exists()


def test_a_wrong_digest_is_refused_and_nothing_unpacked(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path
) -> None:
    with_digest(suite, "f" * 64)
    server.answer = lambda request: request.reply(200, corpus)
    line = fault(fetch, str(suite), tmp_path / "out")
    assert "is not the file it was" in line and "f" * 64 in line and "fetch.yaml" in line
    assert left(tmp_path / "out") == set()


def test_a_right_digest_is_taken(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path
) -> None:
    with_digest(suite, hashlib.sha256(corpus).hexdigest())
    server.answer = lambda request: request.reply(200, corpus)
    fetch(str(suite), tmp_path / "out")


def test_what_was_noted_first_is_due_later(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path
) -> None:
    server.answer = lambda request: request.reply(200, corpus)
    fetch(str(suite), tmp_path / "out")
    (tmp_path / "out" / "tones").rename(tmp_path / "elsewhere")
    other = corpus.replace(b"tones-1.0", b"tones-6.6")
    server.answer = lambda request: request.reply(200, other)
    line = fault(fetch, str(suite), tmp_path / "out")
    assert "is not the file it was" in line and "tones.fetched.json" in line
    server.answer = lambda request: request.reply(200, corpus)
    fetch(str(suite), tmp_path / "out")


@pytest.mark.parametrize("kind", ["truncated", "page", "outside", "link", "bomb"])
def test_a_bad_archive_leaves_nothing_and_the_next_call_asks_again(
    kind: str, suite: Path, server: Server, corpus: bytes, tmp_path: Path
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        info = zipfile.ZipInfo("../outside" if kind == "outside" else "tones/x")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16 if kind == "link" else 0
        file.writestr(info, bytes(3_000_000) if kind == "bomb" else b"/etc", zipfile.ZIP_DEFLATED)
    bad = {"truncated": corpus[:-50], "page": b"<html>"}.get(kind, packed.getvalue())
    server.answer = lambda request: request.reply(200, bad)
    fault(fetch, str(suite), tmp_path / "out")
    assert left(tmp_path / "out") == {"tones.fetched.json"} and not (tmp_path / "outside").exists()
    os.remove(tmp_path / "out" / "tones.fetched.json")
    server.answer = lambda request: request.reply(200, corpus)
    fetch(str(suite), tmp_path / "out")


def test_what_another_call_left_half_done_is_done_again(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda request: request.reply(200, corpus)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_inner", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        fetch(str(suite), tmp_path / "out")
    assert (tmp_path / "out" / "tones.unpacking").is_dir()
    fetch(str(suite), tmp_path / "out")
    assert left(tmp_path / "out") == {"tones", "tones.fetched.json"}


def test_one_corpus_that_fails_stops_no_other(
    suite: Path, server: Server, corpus: bytes, tmp_path: Path
) -> None:
    text = (suite / "fetch.yaml").read_text()
    row = text.partition("corpora:\n")[2]
    gone = row.replace("tones:", "gone:").replace("corpus.zip", "gone")
    (suite / "fetch.yaml").write_text(text.replace(row, gone + row))
    server.answer = lambda request: request.reply(
        *((404,) if "gone" in request.path else (200, corpus))
    )
    assert "gone: http://127.0.0.1" in fault(fetch, str(suite), tmp_path / "out")
    assert (tmp_path / "out" / "tones" / "manifest.tsv").exists()


def test_two_calls_do_not_write_into_one_folder(suite: Path, tmp_path: Path) -> None:
    with disk.lease(tmp_path / "out", wait=True):
        assert "another process" in fault(fetch, str(suite), tmp_path / "out")


def test_a_suite_without_addresses_says_so(tmp_path: Path) -> None:
    assert "cannot be fetched" in fault(load, "demo")
    assert "did you mean sample?" in fault(load, "sampel")


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", ".", ""])
def test_a_corpus_is_a_folder_of_the_output(name: str, suite: Path, tmp_path: Path) -> None:
    text = (suite / "fetch.yaml").read_text()
    (suite / "fetch.yaml").write_text(text.replace("tones:", f'"{name}":'))
    assert "no name of a folder" in fault(load, str(suite))
