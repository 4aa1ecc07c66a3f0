"""The time to the first token: from a prompt on the device until the token that follows it is known on the host.

In a Decoder after minivllm.transformers.apply, as `generate` has it; the forward of transformers on a new cache of its
own, without and with `apply` (eager); and under torch.compile on a static cache of the prompt's length (--compile).
"""

import argparse
from collections.abc import Callable

from benchmarks.columns import COMPILE, DECODER, EAGER
from benchmarks.model import OURS, PLAIN, Sequences, compiled, each_case
from benchmarks.report import Report
from minivllm.testing.timing import failure, time_cpu

NAMES = ("qwen3-0.6b", "qwen3-8b")
BATCHES, CONTEXTS = (1,), (512, 2048)
METHOD = {"first token": "us from the prompt on the device to its next token on the host; variants in turns"}


def in_decoder(model, prompt) -> Callable[[], object]:
    from minivllm.transformers import Decoder

    decoder = Decoder(model, *prompt.shape)
    return lambda: next(decoder.generate(prompt, 1, eos_token_id=[]))


def eagerly(model, prompt) -> Callable[[], object]:
    return lambda: model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()


def under_compile(model, prompt) -> Callable[[], object]:
    import torch

    torch.compiler.reset()
    sequences = Sequences(model, *prompt.shape)
    sequences.fill(prompt[:, :1])
    call = compiled(sequences, prompt, model.device.type)

    def first() -> object:
        sequences.rewind(0)
        return call().tolist()

    for _ in range(3):
        first()
    return first


def run(args: argparse.Namespace, report: Report) -> None:
    """Every dtype x model x length of the prompt x batch."""
    import torch

    ways = [(OURS, DECODER, in_decoder), (PLAIN, EAGER, eagerly), (OURS, EAGER, eagerly)]
    ways += [(PLAIN, COMPILE, under_compile)] * (args.compile is not None)

    def one(models: dict, case: dict, batch: int, context: int) -> None:
        plain = models[PLAIN]
        prompt = torch.randint(0, plain.config.vocab_size, (batch, context), device=plain.device)
        ready, failed = {}, {}
        for name, way, make in ways:
            try:
                call = make(models[name], prompt)
                ready[f"{name} {way}"] = lambda i, call=call: call()
            except Exception as error:
                failed[f"{name} {way}"] = failure(error)
        wait = {"between": torch.cuda.synchronize, "settle": 0.0} if args.device == "cuda" else {}
        results = time_cpu(ready, seconds=0.5 if args.quick else 1.0, rounds=3, batch=1, **wait)
        parameters, tokens = plain.num_parameters(), batch * context
        more = {"tokens": tokens, "batch": batch, "context": context, "mode": "first token"}
        more |= {"bytes": parameters * plain.dtype.itemsize, "flops": 2 * parameters * tokens}
        report.add({"op": "first_token"} | case | more, results | failed)

    each_case(args, NAMES, BATCHES, CONTEXTS, one)
