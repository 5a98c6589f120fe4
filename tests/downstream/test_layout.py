"""Tables for a paper: whatever a name holds, LaTeX takes it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from downstream.report.layout import latex

HOSTILE = r"a_b & 5 % # $x$ {y} ~ ^ \end{tabular} \input{z} [2] <script> | \"q\" 'é' 中文 … ß ÷"
TABLE = [["upstream", "asr WER ↓", "er ACC ↑"], [HOSTILE, "-1.5 ±0.3†", "x\ny"], ["[1pt]", "", ""]]
NOTES = ["A = x\n\\undefined"]


def test_characters_with_a_meaning_are_escaped() -> None:
    lines = latex(TABLE, NOTES).split("\n")
    row = lines[4]
    for escaped in (r"a\_b \& 5 \% \# \$x\$ \{y\} \textasciitilde{} \textasciicircum{}",
                    r"\textbackslash{}end\{tabular\}", "(U+4E2D)(U+6587)", "'é'"):  # fmt: skip
        assert escaped in row
    assert r"-1.5 $\pm$0.3$\dagger$ & x y \\" in row
    assert lines[5].startswith("{[}1pt]")  # else it would be an argument of the row's end
    assert lines[-1] == r"% A = x \undefined"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_it_compiles(tmp_path: Path) -> None:
    document = rf"\documentclass{{article}}\begin{{document}}{latex(TABLE, NOTES)}" + "\n"
    (tmp_path / "t.tex").write_text(document + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-800:]
