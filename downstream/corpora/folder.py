"""A folder of audio and nothing else, for learning without labels."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path

from downstream.base import Example
from downstream.corpora.common import require_folder, require_text
from downstream.corpora.splits import Part, hashed
from upstream.common.errors import UserError

TYPES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".sph")


def read(root: Path, *, dev: Part = 0.05, without: Sequence[str] = ()) -> list[Example]:
    """All audio below `root`, with empty targets; each file is its own speaker.

    dev: the share of files, by the hash of their paths below `root`, that selects. A file stays in
    its split whatever is added. without: patterns of paths below `root` to leave out (`19-*`).
    Raises UserError for a folder without audio or too little of it.
    """
    require_folder(root, "root")
    paths = sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(TYPES) and not name.startswith(".")  # ._x.wav: no audio
    )
    examples = []
    for path in paths:
        name = os.path.relpath(path, root)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in without):
            continue
        require_text(name, path)
        split = "dev" if int(hashed(name)[:8], 16) < dev * 16**8 else "train"
        examples.append(Example(name, path, None, None, "", name, split))
    for split in ("train", "dev"):
        if not any(example.split == split for example in examples):
            fault = f"{len(paths)} audio files, of which `dev: {dev:g}` leaves none for {split}"
            raise UserError(f"{root}: {fault}; types: {' '.join(TYPES)}")
    return examples
