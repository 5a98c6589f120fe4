"""Speed against s3prl: the same upstream, audio, batches, steps and learning rates in one run.

Times s3prl's own expert, heads and optimizer (a few micro-steps, scaled to 1,000 steps for each of
five learning rates) and this project on SID, ER, PR and ASR with a HuBERT Base of random weights,
and where dtw-python is installed the search of QbE; prints the ratios, where the time goes and how
far the limit is, and writes them to a file. Then how a run grows with hours of audio and workers,
and what the whole suite would take on 1, 8 and 64 such devices. On a machine with a GPU everything
is measured there too. About 30 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.subject import TASKS, Setup, write_encoder
from upstream.common.errors import UserError


def alone(what: str, act: Callable[..., Any], *args: Any) -> Any:
    """Run in a process of its own: its peak memory is its own, and nothing is left warm."""
    begun = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        found = pool.submit(act, *args).result()
    print(f"{what}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return found


def measure(setup: Setup) -> dict[str, Any]:
    """All raw figures of one device."""
    from tests.bench import gpu_side, growth, merge_side, our_side, plan_side, qbe_side, s3prl_side

    raw: dict[str, Any] = {"s3prl": {}, "ours": {}}
    alone(f"{setup.device}: weights", write_encoder, setup)
    raw["encoder"] = alone(f"{setup.device}: encoder", our_side.measure_encoder, setup)
    for task in TASKS:
        for side, act in (("s3prl", s3prl_side.measure), ("ours", our_side.measure)):
            raw[side][task] = alone(f"{setup.device}: {task}, {side}", act, setup, task)
    raw["plan"] = alone(f"{setup.device}: plan", plan_side.measure, setup)
    raw["qbe"] = alone(f"{setup.device}: qbe", qbe_side.measure, setup)
    raw["merge"] = alone(f"{setup.device}: merge", merge_side.measure, setup)
    if setup.device == "cpu":
        raw["growth"] = alone("growth", growth.measure, setup)
    if setup.device != "cpu" or setup.quick:
        raw["tried"] = alone(f"{setup.device}: what might pay", gpu_side.measure, setup)
    return raw


def main() -> int:
    """Measure on every device there is, print, write."""
    raw_text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("make bench", description=__doc__, formatter_class=raw_text)
    quick = "a tiny encoder, few steps: does it run? The figures mean nothing"
    where = "where to write (default: results/bench.json; with --quick: nowhere)"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--results", type=Path, metavar="FILE", help=where)
    args = parser.parse_args()
    target = args.results or (None if args.quick else Path("results/bench.json"))
    if target and not target.parent.is_dir():
        parser.error(f"{target.parent}: no such folder")
    import torch

    from tests.bench import gpu_side, report, simulate

    found: dict[str, Any] = {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            try:
                raw = measure(Setup(Path(work), device, args.quick))
            except UserError as error:
                print(f"bench: {error}", file=sys.stderr)
                return 2
        figures = {**report.ratios(raw), **raw["encoder"]["machine"], "raw": raw}
        found = {**found, device: figures} if found else {**figures, "quick": args.quick}
        print(f"\n{device}\n\n{report.table(raw)}\n", flush=True)
        if "tried" in raw:
            print(f"{gpu_side.table(raw['tried'])}\n", flush=True)
        if not args.quick:
            suite = simulate.table(simulate.speeds(raw), 20, [1, 8, 64])
            print(f"{simulate.described(figures)}\n\n{suite}\n", flush=True)
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
