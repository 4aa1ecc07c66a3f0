"""Runs cases in a child process until the time is up, counts, and lives on when a case kills the child or hangs.

The counts lie in memory that both processes see. A failure is printed with SEED:INDEX, which makes its case again."""

import faulthandler
import json
import mmap
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from minivllm.testing.timing import stopwatch

FIELDS = ("cases", "calls", "refused", "wrong", "stray", "crashed")
PROGRESS_SECONDS = 5.0
BATCH = 20000  # cases of one child
HANGS_SECONDS = 120.0


class Campaign:
    """`kind` is one of the modules cpu, gpu and objects."""

    def __init__(self, kind, seed: int, state: Path | None = None, forked: bool = True, most: int = 20):
        self.kind, self.state, self.forked, self.most = kind, state, forked, most
        self.name = kind.__name__.rpartition(".")[2]
        self.shared = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
        self.seed, self.counts = seed, dict.fromkeys(FIELDS, 0)
        self.first = 0
        if state and state.exists():
            held = json.loads(state.read_text())
            if (held["kind"], held["seed"]) != (self.name, seed):
                raise SystemExit(f"{state} is of {held['kind']} with seed {held['seed']}, not {self.name} with {seed}")
            self.first, self.counts = held["next"], held["counts"]

    # What is shared: the case at work, then the counts of this run.
    @property
    def at(self) -> int:
        return int(self.shared[0])

    def total(self) -> dict:
        return {name: self.counts[name] + int(self.shared[1 + i]) for i, name in enumerate(FIELDS)}

    def add(self, **counts):
        for name, count in counts.items():
            self.shared[1 + FIELDS.index(name)] += count

    @property
    def failures(self) -> int:
        return sum(int(self.shared[1 + FIELDS.index(name)]) for name in ("wrong", "stray", "crashed"))

    def command(self, index: int) -> str:
        return f"python -m fuzz {self.name} --only {self.seed}:{index}"

    def one(self, index: int):
        self.shared[0] = index
        try:
            calls, refused = self.kind.run(self.seed, index)
            self.add(cases=1, calls=calls, refused=refused)
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is a finding
            self.add(cases=1, **{"stray" if type(error).__name__ == "Stray" else "wrong": 1})
            self.report(index, "".join(traceback.format_exception(error)[-2:]))

    def report(self, index: int, what: str):
        try:
            described = self.kind.describe(self.seed, index)
        except Exception as error:  # noqa: BLE001
            described = f"(the case cannot be described: {error!r})"
        print(f"\nFAILED  {self.command(index)}\n{described}\n{what}", flush=True)

    def _child(self, first: int, last: int, seconds: float):
        elapsed = stopwatch()
        for index in range(first, last):
            if elapsed() > seconds or self.failures >= self.most:
                break
            self.one(index)
        else:
            index = last
        self.shared[0] = index

    def _forked(self, first: int, last: int, seconds: float) -> int:
        """Runs a batch in a child; gives back the next index."""
        self.shared[0] = first
        child = os.fork()
        if child == 0:
            faulthandler.enable()
            status = 1
            try:
                self._child(first, last, seconds)
                status = 0
            except BaseException:  # noqa: BLE001 -- a forked child must end here
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        return self._wait(child)

    def _wait(self, child: int) -> int:
        moved, seen, said = stopwatch(), (self.at, 0), stopwatch()
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.02)
            now = (self.at, self.total()["calls"])
            if now != seen:
                moved, seen = stopwatch(), now
            if moved() > HANGS_SECONDS:
                os.kill(child, signal.SIGKILL)
            if said() > PROGRESS_SECONDS:
                said = stopwatch()
                print(self.line(), flush=True)
        if status == 0:
            return self.at
        died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit status {status >> 8}"
        self.add(cases=1, crashed=1)
        self.report(self.at, f"the process ended with {died}")
        return self.at + 1

    def line(self) -> str:
        counts = self.total()
        return f"{self.name} seed {self.seed}, next {self.at}: " + ", ".join(f"{counts[f]} {f}" for f in FIELDS)

    def run(self, seconds: float) -> bool:
        """True when nothing failed."""
        self.kind.prepare()
        elapsed, at = stopwatch(), self.first
        while elapsed() < seconds and self.failures < self.most:
            if self.forked:
                at = self._forked(at, at + BATCH, seconds - elapsed())
            else:  # a GPU does not survive fork
                self._child(at, at + BATCH // 100, seconds - elapsed())
                at = self.at
                print(self.line(), flush=True)
            self.save(at)
        print(self.line(), flush=True)
        return self.failures == 0

    def save(self, at: int):
        if self.state:
            held = {"kind": self.name, "seed": self.seed, "next": at, "counts": self.total()}
            self.state.write_text(json.dumps(held) + "\n")
