"""Tokens per second of model.generate, greedily and with whatever it does around the model.

`transformers`: the model as it is, on the cache that generate makes by default; `minivllm`: the same call after
minivllm.transformers.apply, without any graph; `minivllm decoder`: with custom_generate=minivllm.transformers.generate
too, which keeps its Decoder, so that no call but the first, untimed one captures a graph. The prompt is part of a call.
"""

import argparse

from benchmarks.columns import DECODER
from benchmarks.model import OURS, PLAIN, each_case
from benchmarks.report import Report
from minivllm.testing.timing import time_cpu

NAMES = ("qwen3-0.6b",)
BATCHES, CONTEXTS = (1, 16), (512,)
NEW = 64  # tokens that a call adds to each prompt
METHOD = {"generate": f"us a call of model.generate, {NEW} new tokens, greedy, its prompt in it; variants in turns"}


def run(args: argparse.Namespace, report: Report) -> None:
    """Every dtype x model x length of the prompt x batch."""
    import torch

    import minivllm.transformers

    def one(models: dict, case: dict, batch: int, context: int) -> None:
        plain = models[PLAIN]
        prompt = torch.randint(0, plain.config.vocab_size, (batch, context), device=plain.device)
        usual = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": NEW}
        ways = {PLAIN: (plain, {}), OURS: (models[OURS], {})}
        ways[f"{OURS} {DECODER}"] = (models[OURS], {"custom_generate": minivllm.transformers.generate})
        calls = {
            variant: lambda i, model=model, more=more: model.generate(prompt, **usual, **more).tolist()
            for variant, (model, more) in ways.items()
        }
        settle = {"settle": 0.0} if args.device == "cuda" else {}
        results = time_cpu(calls, seconds=0.2 if args.quick else 1.0, rounds=1 if args.quick else 3, batch=1, **settle)
        parameters = plain.num_parameters()
        more = {"tokens": batch * NEW, "batch": batch, "context": context, "mode": "generate"}
        more |= {"bytes": NEW * parameters * plain.dtype.itemsize, "flops": 2 * parameters * batch * (context + NEW)}
        report.add({"op": "generate"} | case | more, results)

    each_case(args, NAMES, BATCHES, CONTEXTS, one)
