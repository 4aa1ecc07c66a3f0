"""Where a decode step of a whole model goes: the kernels of one replay of a Decoder's graph, in order.

    python -m benchmarks.profile_step qwen3-0.6b [--batch 1] [--context 512]

Kernels that are launched programmatically begin long before the one in front of them ends, and then wait: `took` is
from the beginning to the end of a kernel, `adds` from the latest end before it to its own, so the latter add up to the
step. Under the profiler a step takes a few percent longer.
"""

import argparse
from collections import defaultdict

from benchmarks.model import OURS, twins
from benchmarks.step import CONTEXTS, decoder_step

STEPS = 6  # under the profiler; the last is shown


def profiled(step, steps: int) -> list[tuple[str, float, float]]:
    """(kernel, took, adds) in microseconds of the last of so many steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    ranges = [(e.time_range.start, e.time_range.end, e.name) for e in found.events() if e.device_type.name == "CUDA"]
    ranges.sort()
    each = len(ranges) // steps
    end, kernels = max(r[1] for r in ranges[:-each]), []
    for start, stop, name in ranges[-each:]:
        kernels.append((name, stop - start, max(stop - end, 0.0)))
        end = max(end, stop)
    return kernels


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of minivllm.testing.models")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=CONTEXTS[0], help="tokens in the cache")
    args = parser.parse_args()
    with torch.inference_mode(False), torch.no_grad():
        model = twins(args.model, "bf16", "cuda", None)[OURS]
        step, rewind, _ = decoder_step(model, args.batch, args.context)
        rewind()
        for _ in range(STEPS):
            step()
        rewind()
        torch.cuda.synchronize()
        kernels = profiled(step, STEPS)
    sums = defaultdict(list)
    for name, took, adds in kernels:
        sums[name].append((took, adds))
    print(f"{args.model}, batch {args.batch}, {torch.cuda.get_device_name()}: {sum(k[2] for k in kernels):.0f} us")
    print(f"{'calls':>6}{'took':>9}{'adds':>9}{'in all':>9}  kernel")
    for name, of in sorted(sums.items(), key=lambda item: -sum(adds for _, adds in item[1])):
        took, adds = (sum(each[i] for each in of) for i in (0, 1))
        print(f"{len(of):6}{took / len(of):9.2f}{adds / len(of):9.2f}{adds:9.1f}  {name[:90]}")
    print("\nin order:")
    for name, took, adds in kernels:
        print(f"{took:9.2f}{adds:9.2f}  {name[:90]}")


if __name__ == "__main__":
    main()
