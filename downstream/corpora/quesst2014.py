"""QUESST 2014 of MediaEval, searched as SUPERB does: only one language of six, non-native English.

Layout of quesst14Database.tgz, read from s3prl downstream/quesst14_dtw/dataset.py, torchaudio and
public users of the ground truth; not tried on the corpus itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Literal, TypeAlias

from downstream.base import Example
from downstream.corpora.common import complete, read_text, require_folder
from downstream.tasks import trials
from upstream.common.errors import UserError, near_miss

Language: TypeAlias = Literal["albanian", "basque", "czech", "nnenglish", "romanian", "slovak"]
QUERIES = {"dev": "dev", "eval": "test"}
LEXEME = re.compile(r"LEXEME\s+(\S+)\s+\S+\s+\S+\s+\S+\s+(\S+)")  # document, ..., query


def read(
    root: Path,
    target: Literal["trials"],
    *,
    language: Language | None = "nnenglish",
    check: bool = True,
) -> list[Example]:
    """Queries of dev and eval (test) with their true documents, and documents, which both search.

    `root` is quesst14Database: audio folders, and `scoring` with language_key_*.lst (lines of path
    and language) and groundtruth_quesst14_{dev,eval}. language: null takes all six. Nobody is named
    as speaker, so every query is its own. `check=False` accepts a copy whose audio is not complete.
    Raises UserError naming what is missing.
    """
    scoring = require_folder(require_folder(root, "root") / "scoring", "root")
    listed = _listed(scoring / "language_key_utterances.lst", root, language)
    examples = [
        Example(name, path, None, None, trials.write([]), name, "dev test") for name, path in listed
    ]
    examples = complete(root, examples, {}, check)
    documents = {example.id for example in examples}
    for part, split in QUERIES.items():
        truth = scoring / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm"
        true: dict[str, set[str]] = defaultdict(set)
        for match in LEXEME.finditer(read_text(truth)):
            true[match[2]].add(match[1])
        if not true:
            raise UserError(f"{truth}: no LEXEME line; is this the ground truth in NIST's RTTM?")
        queries = [
            Example(name, path, None, None, _trials(true[name], documents), name, split)
            for name, path in _listed(scoring / f"language_key_{part}.lst", root, language)
        ]
        examples += complete(root, queries, {}, check)
    return examples


def _trials(true: set[str], documents: set[str]) -> str:
    """The true documents of a query; without any, one that is not."""
    pairs = [(1, name) for name in sorted(true & documents)]
    return trials.write(pairs or [(0, min(documents))])


def _listed(source: Path, root: Path, language: str | None) -> list[tuple[str, str]]:
    """Names and paths of the audio of a language. Raises UserError if there is none."""
    found, languages = list[tuple[str, str]](), set[str]()
    for number, line in enumerate(read_text(source).splitlines(), 1):
        path, *others = line.split() or [""]
        if len(others) != 1 or "/" not in path:
            raise UserError(f"{source}:{number}: {line!r} is not `<folder>/<path> <language>`")
        languages.add(others[0])
        if language in (None, others[0]):  # the first folder is the corpus's own, as it was named
            found.append((Path(path).stem, str(root / path.partition("/")[2])))
    if not found:
        raise UserError(f"{source}: nothing in {language!r}{near_miss(str(language), languages)}")
    return found
