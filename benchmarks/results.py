"""Committed results, as plots and tables read them: cases with their variants."""

import json
from pathlib import Path
from typing import NamedTuple

OURS = "minivllm"  # the variant that is minivllm's own choice; others of it begin with this name
CASE = ("op", "shape", "tokens", "dtype", "mode", "kind", "context")


class Case(NamedTuple):
    """One case of one run: the rows of its variants by name, and the run they come from."""

    op: str
    shape: str
    tokens: int
    dtype: str
    mode: str | None
    kind: str | None
    context: int | None  # tokens in the cache, or of the prompt
    rows: dict[str, dict]
    run: dict

    def us(self, *variants: str) -> float | None:
        """The fastest of some variants, or None where none was timed."""
        times = [self.rows[name]["us"] for name in variants if "us" in self.rows.get(name, {})]
        return min(times, default=None)

    def any(self, column: str):
        """A column that all rows of a case share."""
        return next(iter(self.rows.values()))[column]


def cases_of(run: dict) -> dict[tuple, Case]:
    """The cases of one run, by its device and their fields."""
    found: dict[tuple, Case] = {}
    for row in run["rows"]:
        key = tuple(row.get(name) for name in CASE)
        case = found.setdefault((run["environment"]["device"], *key), Case(*key, {}, run))
        case.rows[row["variant"]] = row
    return found


class Results:
    """Every case in a directory of JSON files. Where two runs on one kind of device have the same case, the newer one
    counts, whole: figures of two runs never stand beside each other in a row."""

    def __init__(self, directory: Path):
        self.cases: dict[tuple, Case] = {}
        runs = [json.loads(path.read_text()) for path in directory.glob("*.json")]
        for run in sorted(runs, key=lambda run: run["date"]):
            self.cases |= cases_of(run)

    def of(self, device: str, op: str, accuracy: bool = False, **wanted) -> list[Case]:
        """The timed cases of an op on a device (or those of accuracy) whose fields are as wanted, in the order run."""
        return [
            case
            for key, case in self.cases.items()
            if key[0] == device
            and case.op == op
            and (case.kind is not None) == accuracy
            and all(getattr(case, name) == value for name, value in wanted.items())
        ]


def place(run: dict) -> str:
    """The device and the versions of a run, in a line."""
    environment = run["environment"]
    packages = environment["packages"]
    if environment["device"] == "cuda":
        driver = (environment.get("gpu_state") or {}).get("driver_version", "?")
        where = f"{environment['gpu']}, driver {driver}, CUDA {environment['cuda']}"
    else:
        where = f"{environment['cpu']}, {environment['cpu_cores']} cores, {environment['minivllm_threads']} threads"
    return f"{where}, torch {packages.get('torch', '?')}"


def commit(run: dict) -> str:
    return (run["environment"]["git"]["sha"] or "unknown")[:7]


def runs(cases: list[Case]) -> list[dict]:
    """The runs that some cases come from, each once."""
    return list({(case.run["command"], commit(case.run), case.run["date"]): case.run for case in cases}.values())
