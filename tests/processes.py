"""Scripts in a process of their own: for what a test must not do to the one that runs the others."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import minivllm

ROOT = Path(__file__).resolve().parent.parent  # of the repository
PACKAGE = Path(minivllm.__file__).resolve().parent.parent  # where the minivllm under test is imported from
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")


def run(script, *, timeout=120, arguments=("-c",), paths=(PACKAGE, ROOT / "tests"), **environment):
    """Runs a Python script with minivllm importable; gives back its CompletedProcess. None removes a variable."""
    inherited = os.environ.get("PYTHONPATH", "")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [inherited])])}
    for name, value in environment.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = str(value)
    command = [sys.executable, *arguments]
    if script is not None:
        command.append(textwrap.dedent(script))
    return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, timeout=timeout)


def succeeds(script, **options):
    """Runs a script that must end well; gives back what it printed."""
    done = run(script, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def on_ranks(*arguments, ranks=2):
    """Runs a script or a module on so many processes of torchrun, with the repository importable."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    paths = (PACKAGE, ROOT, ROOT / "tests")
    return succeeds(None, arguments=(*torchrun, *arguments), paths=paths, timeout=300, OMP_NUM_THREADS=1)
