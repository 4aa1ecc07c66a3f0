"""See the package. Exit status: 0 when everything was right, 1 when something was wrong, 2 when nothing could run."""

import argparse
import sys
from pathlib import Path

from fuzz import cpu, gpu, objects, soak
from fuzz.campaign import Campaign

KINDS = {"cpu": cpu, "objects": objects, "gpu": gpu}


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=sys.modules["fuzz"].__doc__.split("\n")[0])
    parser.add_argument("kind", choices=[*KINDS, "soak"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="SEED:INDEX", help="one case, in this process")
    parser.add_argument("--resume", metavar="STATE", type=Path, help="a file that remembers where to go on, and counts")
    parser.add_argument("--failures", type=int, default=20, help="after so many it stops")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="of gpu and soak; cpu: a dry run")
    parser.add_argument("--processes", type=int, default=12, help="of soak")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.kind == "soak" and options.only:
        print(soak.run(*map(int, options.only.split(":")), options.device))
        return 0
    if options.kind == "soak":
        return soak.main(options.device, options.processes, options.seconds, options.seed, options.resume)
    kind = KINDS[options.kind]
    gpu.DEVICE = options.device
    if reason := kind.why_not():
        print(f"fuzz {options.kind}: nothing ran: {reason}")
        return 2
    if options.only:
        seed, index = map(int, options.only.split(":"))
        campaign = Campaign(kind, seed)
        kind.prepare()
        campaign.one(index)
        print(kind.describe(seed, index), campaign.line(), sep="\n")
        return campaign.failures > 0
    campaign = Campaign(kind, options.seed, options.resume, options.kind != "gpu", options.failures)
    return not campaign.run(options.seconds)


if __name__ == "__main__":
    sys.exit(main())
