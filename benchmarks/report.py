"""The rows of a run: printed as they come, and written to the JSON file after every case, so that a run cut short keeps
what it measured.

    {"schema": 1, "op": ..., "date": UTC, "seconds": ..., "command": ..., "environment": {...}, "method": {...},
     "rows": [...]}

A row is one variant of one case. Of the case: op, shape (a name), tokens, hidden, outputs, dtype, mode, copies, bytes
(read and written once), flops. Of the variant: variant, kernel (the row that minivllm ran), and either us, low_us,
high_us, best_us, samples or error; peak_bytes where memory is measured.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.environment import environment, gpu_state
from minivllm.testing.timing import Failed, Timing, now, stopwatch

SCHEMA = 1


def reproducing(arguments: list[str], op: str, program: str) -> str:
    """The command that measures one op again: the arguments without where the results went."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--json", "--json-dir", "--commit"):
            kept.append(op if argument == "all" and not kept else argument)
        skip = argument in ("--json", "--json-dir", "--commit")
    return " ".join([program, *kept])


class Report:
    def __init__(
        self, op: str, device: str, command: list[str], path: str | None, method: dict, commit: str | None,
        program: str = "python -m benchmarks"
    ):  # fmt: skip
        self.path = Path(path) if path else None
        self.elapsed = stopwatch()
        self.data = {
            "schema": SCHEMA,
            "op": op,
            "date": now(),
            "seconds": 0.0,
            "command": reproducing(command, op, program),
            "environment": environment(device, commit),
            "method": method,
            "rows": [],
        }

    def add(self, case: dict, results: dict[str, Timing | Failed], extra: dict[str, dict] | None = None) -> None:
        """One row per variant of a case; extra: more columns by variant."""
        for name, result in results.items():
            row = case | {"variant": name} | (extra or {}).get(name, {}) | rounded(result._asdict())
            self.data["rows"].append(row)
        self.print_case(case, results, extra or {})
        self.write()

    def add_rows(self, rows: list[dict]) -> None:
        self.data["rows"] += rows
        self.write()

    def print_case(self, case: dict, results: dict, extra: dict) -> None:
        title = " ".join(str(case[key]) for key in ("op", "shape", "dtype") if key in case)
        context = f", context {case['context']:,}" if "context" in case else ""
        print(f"\n{title}, {case['tokens']} tokens{context} [{self.elapsed():.0f} s]")
        for name, result in results.items():
            kernel = extra.get(name, {}).get("kernel") or ""
            if isinstance(result, Failed):
                print(f"  {name:34} {kernel:22} {result.error[:120]}")
                continue
            spread = f"({result.low_us:.2f} .. {result.high_us:.2f})"
            rate = case["bytes"] / result.us / 1e3
            print(f"  {name:34} {kernel:22} {result.us:10.2f} us {spread:24} {rate:8.0f} GB/s")
        sys.stdout.flush()

    def write(self) -> None:
        """Writes the file whole, or leaves the one before."""
        if self.path is None:
            return
        self.data["seconds"] = round(self.elapsed(), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        rows = ",\n".join("  " + json.dumps(row) for row in self.data["rows"])
        head = json.dumps(self.data | {"rows": []}, indent=1)
        new.write_text(head[: head.rindex("[]")] + "[\n" + rows + "\n ]\n}\n")
        os.replace(new, self.path)

    def close(self) -> None:
        """Writes the last time, with the clocks as they are after the work."""
        if self.data["environment"]["device"] == "cuda":
            self.data["environment"]["gpu_state_after"] = gpu_state()
        self.write()
        print(f"\n{self.data['op']}: {self.elapsed():.0f} s" + (f", {self.path}" if self.path else ""))


def rounded(columns: dict) -> dict:
    """Floats with four digits past the point: the clock gives no more."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in columns.items()}
