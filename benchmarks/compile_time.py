"""From text to proved schedule: milliseconds for every shipped variant, imports done.

    python benchmarks/compile_time.py [--repeat 15] [--json]

Each run starts from the text: parse, check, bake, prove, check the certificates, derive the schedule of both axes.
Nothing is cached between runs. Also times `attn-dsl --help` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from attn_dsl.frontend import load, shipped
from attn_dsl.passes.pipeline import run


def median_ms(repeat: int, name: str) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run(load(name), stop_after="schedule")
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def help_ms(repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "attn_dsl", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args()
    run(load("causal"), stop_after="schedule")  # imports, the grammar, the rules
    rows = [(name, median_ms(arguments.repeat, name)) for name in shipped()]
    rows.append(("attn-dsl --help", help_ms(arguments.repeat)))
    if arguments.json:
        for name, ms in rows:
            print(json.dumps({"name": name, "median_ms": round(ms, 3)}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "median, ms", title="text to proved schedule")
    table.columns[1].justify = "right"
    for name, ms in rows:
        table.add_row(name, f"{ms:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
