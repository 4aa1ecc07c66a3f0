"""A decode step of a whole model over several GPUs, beside the same on one, and the time that the ranks' sums take.

    torchrun --nproc-per-node 2 -m benchmarks.sharded_step [--json FILE]

`minivllm alone` is the model on one GPU and `minivllm sharded` its part after minivllm.transformers.shard, both with
minivllm.transformers.apply in a Decoder, as in step.py. `sums alone` is a graph of the all-reduces of such a step and
of nothing else. All ranks time all of it together; the rows are those of rank 0, and name its GPU and their number.
"""

import argparse
import gc
import os
import sys

from benchmarks.model import OURS, TORCH_DTYPES
from benchmarks.report import Report
from benchmarks.step import BATCHES, CONTEXTS, NAMES, STEPS, case_of, decoder_step
from minivllm.testing.timing import Timing, busy_cuda, event_us, summary

CONTEXT, QUEUED = CONTEXTS[0], STEPS["cuda"]
SAMPLES = 20
METHOD = {
    "sharded_step": f"us a step on the device: {QUEUED} steps are queued, the first one's start is in it; {SAMPLES} "
    "samples, as many on every rank"
}


def timed(call, rewind) -> Timing:
    """Of a step. Every rank makes the same number of calls, as each waits for the others in it."""
    import torch
    import torch.distributed as dist

    def steps() -> None:
        for _ in range(QUEUED):
            call()

    samples = []
    for _ in range(SAMPLES + 1):
        rewind()
        dist.barrier()
        torch.cuda.synchronize()
        samples.append(event_us(torch, steps) / QUEUED)
    return summary(samples[1:])


def sums_alone(config, batch: int, dtype):
    """The replay of a graph with the all-reduces of one step."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1, dtype=dtype, device="cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = torch.zeros(batch, 1, config.hidden_size, dtype=dtype, device="cuda")
        for _ in range(2 * config.num_hidden_layers):
            dist.all_reduce(x)
    return graph.replay


def time_model(name: str, dtype: str, batches: list[int], report: Report | None) -> None:
    """One model, first whole and then cut. report: of rank 0."""
    import torch
    import torch.distributed as dist

    import minivllm.transformers
    from minivllm.testing.models import causal_lm

    model = causal_lm(name, TORCH_DTYPES[dtype], "cuda")
    case = {"op": "sharded_step", "shape": name, "hidden": model.config.hidden_size}
    case |= {"outputs": model.config.vocab_size, "dtype": dtype, "ranks": dist.get_world_size()}
    cases = {batch: case_of(model, case, batch, CONTEXT) for batch in batches}
    results: dict[int, dict[str, Timing]] = {batch: {} for batch in batches}
    for variant in ("alone", "sharded"):
        if variant == "sharded":
            minivllm.transformers.undo(model)
            minivllm.transformers.shard(model)
            torch.cuda.empty_cache()
        applied = minivllm.transformers.apply(model)
        if applied.left_alone:
            raise RuntimeError(repr(applied))
        for batch in batches:
            torch.manual_seed(batch)  # the same prompt on every rank
            ready = decoder_step(model, batch, CONTEXT)
            results[batch][f"{OURS} {variant}"] = timed(ready.step, ready.rewind)
    for batch in batches:
        results[batch]["sums alone"] = timed(sums_alone(model.config, batch, model.dtype), lambda: None)
        if report is not None:
            report.add(cases[batch], results[batch])


def main() -> int:
    import torch
    import torch.distributed as dist

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, metavar="NAME", help="of minivllm.testing.models")
    parser.add_argument("--tokens", nargs="+", type=int, default=BATCHES, metavar="M", help="batches")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="bf16")
    parser.add_argument("--json", metavar="FILE", help="where the rows go")
    parser.add_argument("--commit", metavar="SHA", help="the commit measured, where .git does not say")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        parser.error("start it on GPUs, with torchrun --nproc-per-node 2 -m benchmarks.sharded_step")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    report = None
    if dist.get_rank() == 0:
        program = f"torchrun --nproc-per-node {dist.get_world_size()} -m benchmarks.sharded_step"
        report = Report("sharded_step", "cuda", sys.argv[1:], args.json, METHOD, args.commit, program)
    busy_cuda()
    with torch.no_grad():
        for name in args.models:
            time_model(name, args.dtype, args.tokens, report)
            gc.collect()  # the model and its graphs, for which NCCL would wait
            torch.cuda.empty_cache()
    if report is not None:
        report.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
