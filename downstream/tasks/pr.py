"""PR as SUPERB does it: phones of every word, a linear head per frame, CTC, PER.

Source: s3prl downstream/ctc with libriphone.yaml. 74 classes: `<pad>` (the blank, 0), `<eos>`,
`<unk>`, then 71 symbols: SIL, SPN and 69 stress-marked ARPAbet phones.
"""

from __future__ import annotations

from collections.abc import Sequence

from downstream.base import Labels, Task
from downstream.tasks.lexicon import PHONES

SPECIALS = ("<pad>", "<eos>", "<unk>")


def labels(tokens: str, targets: Sequence[str]) -> Labels:
    """SUPERB's 74 tokens, or the phones of the training targets for another phone set."""
    superb = tokens == "superb"
    known = PHONES if superb else sorted({phone for t in targets for phone in t.split()})
    refusal = "{!r} is no phone of SUPERB; write tokens: train to take those of the training set"
    specials = frozenset({"<pad>", "<eos>"})
    return Labels(
        (*SPECIALS, *known), str.split, " ".join, specials, "<eos>", refusal if superb else ""
    )


TASK = Task("pr", "frames", "frame_ctc", ("per",), labels)
