"""What every room uses: errors, registry, schema, progress, files on disk."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # the clone, or site-packages
_INSTALLED = PROJECT / "speech_ft_bench_data"  # where setup.py puts recipes and published tables
DATA = _INSTALLED if _INSTALLED.is_dir() else PROJECT


def shipped(path: Path) -> Path:
    """`recipes/...` as the README writes it, also where no clone is: then the installed file."""
    installed = DATA / path
    is_ours = path.parts[:1] == ("recipes",) and not path.exists() and installed.exists()
    return installed if is_ours else path
