"""Fails on a skip that is not expected: `python .ci/skips.py build/test.log`, a log of pytest with -ra."""

import re
import sys
from pathlib import Path

allowed = [
    re.compile(line)
    for line in (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
found = re.findall(r"^SKIPPED \[\d+\] (?:\S+?:(?:\d+:)? )?(.*)$", Path(sys.argv[1]).read_text(), re.MULTILINE)
unexpected = sorted({reason for reason in found if not any(pattern.fullmatch(reason) for pattern in allowed)})
for reason in unexpected:
    print(f"unexpected skip: {reason}")
print(f"{len(found)} reasons of skipped tests, {len(unexpected)} unexpected (.ci/allowed_skips.txt)")
sys.exit(bool(unexpected))
