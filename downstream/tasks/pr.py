"""PR as SUPERB does it: phones of every word, a linear head per frame, CTC, PER.

Source: s3prl downstream/ctc with libriphone.yaml. 74 classes: `<pad>` (the blank, 0), `<eos>`,
`<unk>`, then 71 symbols: SIL, SPN and 69 stress-marked ARPAbet phones.
"""

from __future__ import annotations

from collections.abc import Sequence

from downstream.base import Labels, Task
from downstream.tasks.labels import Tokens
from downstream.tasks.lexicon import PHONES

SPECIALS = ("<pad>", "<eos>", "<unk>")


def labels(tokens: str, targets: Sequence[str]) -> Labels:
    """SUPERB's 74 tokens, or the phones of the training targets for another phone set."""
    superb = tokens == "superb"
    known = PHONES if superb else sorted({phone for t in targets for phone in t.split()})
    specials = frozenset({"<pad>", "<eos>"})
    return Tokens((*SPECIALS, *known), specials, str.split, " ".join, "<eos>", closed=superb)


TASK = Task("pr", "frames", "frame_ctc", ("per",), labels)
