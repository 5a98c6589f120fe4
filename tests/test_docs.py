"""README and docs/: short, linked, and true of the program they describe."""

from __future__ import annotations

import argparse
import configparser
import inspect
import os
import re
import runpy
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import benchmark
import merging  # noqa: F401 - registers methods
from downstream import recipe as task_recipes
from downstream.base import TASKS
from downstream.corpora import manifest
from merging import recipe as merge_recipes
from merging.methods import METHODS
from merging.tuning import recipe as tuning_recipes
from upstream.common import PROJECT as ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
SITE = sorted(DOCS.glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *SITE]
COMMANDS_IN = [*PAGES, ROOT / "results" / "README.md", ROOT / "results" / "strategies.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
DOORS = ("benchmark.py", "speech-ft-bench")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", path.read_text())


def spans(path: Path) -> list[str]:
    """Code within lines, each with single blanks."""
    return [" ".join(code.split()) for code in SPAN.findall(prose(path))]


def blocks(path: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(path.read_text()) if name == language]


def test_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 9_000


# --- links


def github_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def mkdocs_anchor(heading: str) -> str:
    """As Python-Markdown's toc extension makes it."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors(path: Path) -> set[str]:
    """Those that hold on GitHub and on the site alike."""
    headings = [heading.replace("`", "") for heading in HEADING.findall(prose(path))]
    return {github_anchor(h) for h in headings} & {mkdocs_anchor(h) for h in headings}


def faults(page: Path) -> Iterator[str]:
    """What is wrong with the links of a page."""
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists():
            yield f"{link}: no such file"
        elif page.parent == DOCS and not target.is_relative_to(DOCS):
            yield f"{link}: leads out of the site"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(faults(page)) == []


def test_a_broken_link_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.DOCS", tmp_path)
    (tmp_path / "there.md").write_text("# A title\n\n```\n# no title\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#a-title) [b](gone.md) [c](there.md#no-title) [d](#none)\n"
        "[e](https://example.org/x) [f](/)\n"
    )
    assert [fault.partition(":")[0] for fault in faults(page)] == [
        "gone.md", "there.md#no-title", "#none", "/",
    ]  # fmt: skip


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == [page.name for page in SITE]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    assert (tmp_path / "site" / "index.html").is_file()


def test_no_sentence_stands_on_two_pages_of_the_site() -> None:
    sentences: Counter[str] = Counter()
    for page in SITE:
        text = " ".join(prose(page).split())
        sentences.update({part for part in re.split(r"(?<=[.:]) | \| ", text) if len(part) > 50})
    assert [sentence for sentence, pages in sentences.items() if pages > 1] == []


# --- commands


def calls(line: str) -> Iterator[list[str]]:
    """The words after `benchmark.py` in a shell line, within quotes as well."""
    words = shlex.split(line, comments=True)
    for number, word in enumerate(words):
        if Path(word).name in DOORS:
            yield words[number + 1 :]
        elif any(f"{door} " in word for door in DOORS):
            yield from calls(word)


def shown(path: Path) -> Iterator[list[str]]:
    """Every call of the program that a page shows, in blocks and within lines."""
    lines = spans(path)
    for name, code in FENCE.findall(path.read_text()):
        if name not in ("python", "yaml"):
            lines += code.replace("\\\n", " ").splitlines()
    for line in lines:
        if any(door in line for door in DOORS):
            yield from calls(line)


def in_recipes() -> Iterator[list[str]]:
    """The commands in the headers of the recipes."""
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        for line in path.read_text().splitlines():
            if command := re.match(r"# Run: +(.*?)(, or .*)?$", line):
                yield from calls(command[1])


def options() -> dict[str, set[str]]:
    """The flags of every command, in full."""
    (added,) = [
        action
        for action in benchmark.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return {name: set(command._option_string_actions) for name, command in added.choices.items()}


def require_parsed(words: list[str]) -> None:
    """Raises SystemExit for a call that the parser refuses, AssertionError for a missing recipe.

    argparse takes the beginning of a flag for the flag; a page shows it in full.
    """
    if words in ([], ["..."]) or (len(words) == 1 and words[0] in benchmark.COMMANDS):
        return  # only the name
    command = ["run", *words] if words[0].startswith("-") else words
    args = benchmark.parser().parse_args(command)
    flags = {word.partition("=")[0] for word in command if word.startswith("--")}
    if not flags <= options()[command[0]]:
        raise SystemExit(2)
    names = f"{getattr(args, 'upstream', '') or ''},{getattr(args, 'recipe', '') or ''}"
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", names):
        assert (ROOT / recipe).is_file() or recipe.startswith("recipes/mine/"), recipe
    suite = getattr(args, "suite", None)
    assert suite is None or suite in SUITES or suite.startswith("recipes/"), suite


SUITES = {"mine", *(path.name for path in (ROOT / "recipes").iterdir())}


@pytest.mark.parametrize("path", COMMANDS_IN, ids=name_of)
def test_commands_are_the_programs(path: Path) -> None:
    for words in shown(path):
        try:
            require_parsed(words)
        except SystemExit:
            pytest.fail(f"{name_of(path)}: the parser refuses {shlex.join(words)}")


def test_commands_of_recipes_are_the_programs() -> None:
    commands = list(in_recipes())
    assert len(commands) > 50
    for words in commands:
        require_parsed(words)


@pytest.mark.parametrize(
    "line",
    [
        "benchmark.py --upsteam fbank",
        "benchmark.py merge --base a --tuned b --out c",
        ".venv/bin/python benchmark.py compare a",
        "sbatch --wrap '.venv/bin/python benchmark.py --upstream a --worker 4x'",
        "torchrun --nproc-per-node 2 benchmark.py finetun recipes/demo/finetune.yaml",
        "speech-ft-bench list upstream",
    ],
)
def test_a_wrong_command_is_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = calls(line)
    with pytest.raises(SystemExit):
        require_parsed(words)


def test_flags_within_lines_are_the_programs() -> None:
    """`--cache-gb` and the like, alone or with a value."""
    flags = set().union(*options().values())
    for page in PAGES:
        named = {code.split()[0] for code in spans(page) if code.startswith("--")}
        assert named <= flags, name_of(page)


def test_every_command_is_on_the_site() -> None:
    named = {words[0] for page in SITE for words in shown(page) if words}
    assert set(benchmark.COMMANDS) - {"run"} <= named


def test_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    there = {name for line in targets for name in line.split()}
    for page in PAGES:
        code = "\n".join([*spans(page), *(text for _, text in FENCE.findall(page.read_text()))])
        assert set(re.findall(r"^make ([a-z][\w-]*)", code, re.MULTILINE)) <= there, name_of(page)


# --- names


def test_files_that_are_named_are_there() -> None:
    for page in PAGES:
        for code in spans(page):
            if re.fullmatch(r"(recipes|tests|docs|upstream|downstream|merging)(/[\w.-]+)+/?", code):
                assert (ROOT / code).exists() or "mine" in code, f"{name_of(page)}: {code}"


def test_tables_of_names_are_complete() -> None:
    def missing(page: str, names: Any) -> set[str]:
        return set(names) - set(re.findall(r"[\w-]+", (DOCS / page).read_text()))

    assert missing("checkpoints.md", METHODS) == set()
    assert missing("tasks.md", TASKS) == {"asr_ted"}  # Speech-FT's own, of recipes/superb/tasks
    assert missing("finetuning.md", tuning_recipes.STRATEGIES) == set()
    assert missing("own-data.md", inspect.signature(manifest.read).parameters) == set()
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert missing("index.md", parser["options.extras_require"]) == set()


# --- numbers


def test_intervals_in_the_text_are_those_of_the_table() -> None:
    """A difference has one ±: what docs/finetuning.md says is a rounded cell of the table."""
    pair = r"\(([+-]\d+\.\d+) ±(\d+\.\d+)"
    table = re.findall(pair, (ROOT / "results" / "strategies.md").read_text())
    rounded = {(f"{float(a):+.1f}", f"{float(b):.1f}") for a, b in table if len(a) > 4}
    quoted = re.findall(pair, (DOCS / "finetuning.md").read_text())
    assert len(quoted) == 5 and set(quoted) <= rounded


# --- examples


RECIPES = {
    name: text
    for page in (README, *SITE)
    for text in blocks(page, "yaml")
    for name in [text.partition("\n")[0].removeprefix("# recipes/mine/")]
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder recipes/mine that a reader has in the end."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    return folder


def test_every_recipe_is_a_whole_file_of_one_name() -> None:
    texts = [text for page in (README, *SITE) for text in blocks(page, "yaml")]
    assert len(texts) == len(RECIPES) >= 6
    assert all(re.fullmatch(r"[a-z]+\.yaml", name) for name in RECIPES), list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads(name: str, suite: Path) -> None:
    kinds: dict[str, Any] = {
        "task": task_recipes.load,
        "merge": merge_recipes.load_recipe,
        "finetune": tuning_recipes.load_recipe,
    }
    kind = yaml.safe_load(RECIPES[name])["kind"]
    assert kinds[kind](suite / name).kind == kind


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which docs/score_own_encoder.py has run."""
    folder = tmp_path_factory.mktemp("scored")
    before = Path.cwd()
    os.chdir(folder)
    try:
        program = runpy.run_path(str(DOCS / "score_own_encoder.py"))
        assert program["main"](Path("own_encoder")) == 0
    finally:
        os.chdir(before)
    return folder


def test_an_encoder_of_ones_own_is_scored(scored: Path) -> None:
    """The example says what to expect: its bands are too coarse for the tones."""
    table = (scored / "own_encoder" / "results" / "table.csv").read_text()
    assert "Bands" in table and ",worse," in table


RUNNABLE = [page for page in SITE if "<!-- runnable -->" in page.read_text()]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_python_on_a_page_runs(
    page: Path, scored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scored)
    codes = re.findall(r"<!-- runnable -->\n```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert len(codes) == page.read_text().count("<!-- runnable -->")
    names: dict[str, Any] = {"__name__": "docs"}
    for code in codes:
        exec(compile(code, name_of(page), "exec"), names)
    assert "worse" in capsys.readouterr().out


def test_python_that_is_not_run_is_readmes_class_alone() -> None:
    """It is run by tests/test_cli.py."""
    counts = {name_of(page): len(blocks(page, "python")) for page in (README, *SITE)}
    marked = {name_of(page): page.read_text().count("<!-- runnable -->") for page in SITE}
    assert {name for name, count in counts.items() if count != marked.get(name, 0)} == {"README.md"}
    assert counts["README.md"] == 1
