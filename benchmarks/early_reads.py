"""Do loads before griddepcontrol.wait see what the work in front wrote, on a GPU that several processes share?

python -m benchmarks.early_reads [--processes 16] [--seconds 60] [--json FILE]

Compiles early_reads.cu for the GPU at hand and runs it in many processes at once. The rows are sums over the processes:
launches, and loads that were stale before and after the wait, of the first and of the last call behind a writer.
docs/decisions/0011 says what follows from them.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.device_peers import nvcc
from benchmarks.environment import gpu_state
from minivllm.testing.timing import now

SOURCE = Path(__file__).with_suffix(".cu")
NAMES = ("writer", "first_call")


def run(processes: int, seconds: float) -> list[dict]:
    """One row per pattern, summed over the processes."""
    with tempfile.TemporaryDirectory() as directory:
        program = f"{directory}/early_reads"
        subprocess.run([nvcc(), "-O3", "-std=c++17", "-arch=native", "-o", program, str(SOURCE)], check=True)
        commands = [[program, str(seconds), str(seed)] for seed in range(processes)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        outputs = [process.communicate()[0] for process in running]
    if failed := [process.returncode for process in running if process.returncode]:
        raise SystemExit(f"{len(failed)} of {processes} processes failed")
    sums: dict[tuple, dict] = {}
    for output in outputs:
        for row in map(json.loads, output.splitlines()):
            total = sums.setdefault(tuple(row[name] for name in NAMES), {name: row[name] for name in NAMES})
            for name in row.keys() - set(NAMES):
                total[name] = total.get(name, 0) + row[name]
    return list(sums.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = run(args.processes, args.seconds)
    command = f"python -m benchmarks.early_reads --processes {args.processes} --seconds {args.seconds:g}"
    for row in rows:
        print(json.dumps(row))
    if args.json:
        head = {"op": "early_reads", "date": now(), "command": command, "gpu": gpu_state(), "rows": rows}
        Path(args.json).write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
