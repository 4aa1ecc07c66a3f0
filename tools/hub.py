"""Lays wheels out as a repository of the `kernels` hub of Hugging Face: `python tools/hub.py dist/*/*.whl DIRECTORY`.

There a kernel is a folder build/VARIANT that is a Python package, with a metadata.json beside its modules. The
extension asks nothing of torch when it is built, so one variant, that of torch's stable ABI, serves every torch from
2.10 on. Several wheels may go to one directory: that for the CPU and the one with CUDA are two variants. Try it by

    kernels.get_local_kernel(Path("DIRECTORY")).rms_norm(x, weight)
"""

import argparse
import json
import re
import shutil
import zipfile
from pathlib import Path

OLDEST_TORCH = "210"


def lay_out(wheel: Path, directory: Path) -> Path:
    """The variant's folder, which is made anew."""
    cuda = re.search(r"\+cu(\d+)-", wheel.name)
    backend = f"cu{cuda[1]}0" if cuda else "cpu"
    variant = directory / "build" / f"torch-stable-abi{OLDEST_TORCH}-{backend}-x86_64-linux"
    shutil.rmtree(variant, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("minivllm/"):
                target = variant / name.removeprefix("minivllm/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    metadata = {
        "id": "minivllm",  # the name that the package is imported by: modules of the extension's own look for it
        "name": "minivllm",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda" if cuda else "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path, nargs="+")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    for wheel in args.wheel:
        print(lay_out(wheel, args.directory))


if __name__ == "__main__":
    main()
