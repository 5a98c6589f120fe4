"""TED-LIUM 3: segments, filters, the hours budget and the text rules."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from downstream.corpora.tedlium import normalised, read
from upstream.common.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "dev", "test"):
        for kind in ("stm", "sph"):
            (tmp_path / "legacy" / part / kind).mkdir(parents=True)
        lines = [
            f"{part}talk 1 Ann 0.00 2.00 <o,f0,female> it 's a well-known FACT",
            f"{part}talk 1 Ann 2.00 2.50 <o,f0,female> too short",
            f"{part}talk 1 inter_segment_gap 2.50 4.00 <o,,unknown> ignore_time_segment_in_scoring",
            f"{part}talk 1 Ann 4.00 6.00 <o,f0,female> with <unk> inside",
            f"{part}talk 1 Ann 6.00 9.00 <o,f0,female> the end",
        ]
        (tmp_path / "legacy" / part / "stm" / f"{part}talk.stm").write_text("\n".join(lines) + "\n")
        wav = np.zeros(16_000 * 9)
        sph = tmp_path / "legacy" / part / "sph" / f"{part}talk.sph"
        soundfile.write(sph, wav, 16_000, format="NIST", subtype="PCM_16")
    return tmp_path


def targets(root: Path, split: str, hours: float | None = None) -> list[str]:
    return [e.target for e in read(root, "text", hours=hours) if e.split == split]


def test_every_split_is_filtered(root: Path) -> None:
    for split in ("train", "dev", "test"):
        assert targets(root, split) == ["IT'S A WELL KNOWN FACT", "THE END"]
    found = read(root, "text")
    assert found[1].start == 6.0 and found[1].end == 9.0 and found[1].speaker == "Ann"


def test_hours_stop_at_the_first_segment_that_does_not_fit(root: Path) -> None:
    """Nothing shorter of a later talk fills the rest; dev and test are whole."""
    later = root / "legacy" / "train" / "stm" / "zlater.stm"
    later.write_text("zlater 1 Bo 0.00 1.50 <o,f0,male> short\n")
    audio = root / "legacy" / "train" / "sph" / "traintalk.sph"
    shutil.copy(audio, audio.with_name("zlater.sph"))
    assert targets(root, "train", 4 / 3600) == ["IT'S A WELL KNOWN FACT"]
    assert targets(root, "train", 5 / 3600) == ["IT'S A WELL KNOWN FACT", "THE END"]
    assert targets(root, "train") == ["IT'S A WELL KNOWN FACT", "THE END", "SHORT"]
    assert len(targets(root, "test", 4 / 3600)) == 2


def test_missing_audio_is_named(root: Path) -> None:
    (root / "legacy" / "dev" / "sph" / "devtalk.sph").unlink()
    with pytest.raises(UserError, match=r"devtalk\.sph"):
        read(root, "text")


def test_text_rules() -> None:
    assert normalised("so i 'm 100% sure-ish") == "SO I'M SURE ISH"
