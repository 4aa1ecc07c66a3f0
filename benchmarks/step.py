"""A decode step of a whole model with random weights, from the embedding of a token to the choice of the next one, and
beside it the time of reading the weights.

floor: one kernel for each weight that a step reads, which only reads it, in the order of the layers, in a CUDA graph;
the fastest of several numbers of blocks. It does not read the cache, whose bytes a row names. `transformers` and
`minivllm`: the model without and with minivllm.transformers.apply, on a static cache as a CUDA graph (static), in a
Decoder, and under torch.compile with reduce-overhead (--compile). All models share their weights' memory.
"""

import argparse

from benchmarks.model import OURS, PLAIN, Sequences, compiled, graphed, twins
from benchmarks.report import Report
from minivllm.testing.timing import failure, time_cpu

NAMES = ("qwen3-0.6b", "qwen3-8b")
BATCHES = (1, 16)
CONTEXT, ROOM = 512, 512  # tokens in the cache, and rows behind them
STEPS = 16  # queued in one sample
METHOD = {
    "step": f"us a step: {STEPS} steps are queued, from the first call to the end on the device; variants in turns"
}


def weights_read(model) -> list:
    """What one step reads: every matrix once, the head's too, where it is the embedding as well."""
    layers = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
    return [*layers, model.get_output_embeddings().weight]


def floors(model) -> dict:
    """Replays of graphs that read the weights, by the number of blocks for each SM."""
    import torch

    from benchmarks import device_peers

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    found = {}
    for each in (1, 2, 4):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights_read(model):
                device_peers.read(weight, sms * each, programmatic=True)
        found[f"floor x{each}"] = graph.replay
    return found


def static_step(model, prompt, way: str):
    """(a step, what rewinds it)"""
    sequences = Sequences(model, len(prompt), CONTEXT + ROOM)
    sequences.fill(prompt, logits_to_keep=1)
    sequences.rewind(CONTEXT)
    if way == "compile":
        step = compiled(sequences, sequences.tokens, "cuda")
        for _ in range(3):
            step()
            sequences.rewind(CONTEXT)
    else:
        step, _ = graphed(sequences, sequences.step, CONTEXT)
    return step, lambda: sequences.rewind(CONTEXT)


def decoder_step(model, prompt):
    """The same of a Decoder, as `generate` queues it."""
    from minivllm.transformers import Decoder

    decoder = Decoder(model, len(prompt), CONTEXT + ROOM)
    decoder.prefill(prompt)

    def rewind() -> None:
        decoder._positions.fill_(CONTEXT)
        decoder._count.zero_()
        decoder._length = CONTEXT

    return lambda: decoder._advance(model), rewind


def variants_of(models: dict, prompt, args: argparse.Namespace) -> tuple[dict, list, dict]:
    """(calls, what rewinds them, failures)"""
    import torch

    ready, rewinds, failed = {}, [], {}
    ways = ["static", "decoder"] + ["compile"] * (args.compile is not None) if args.device == "cuda" else ["decoder"]
    for way in ways:
        for name in (PLAIN, OURS):
            if way == "compile":
                torch.compiler.reset()
            try:
                make = decoder_step if way == "decoder" else lambda model, ids, way=way: static_step(model, ids, way)
                call, rewind = make(models[name], prompt)
                ready[f"{name} {way}"] = call
                rewinds.append(rewind)
            except Exception as error:
                failed[f"{name} {way}"] = failure(error)
    return ready, rewinds, failed


def case_of(model, name: str, batch: int, dtype: str) -> dict:
    """What a step of `batch` sequences reads: the weights, and what the cache holds of the context."""
    config, size = model.config, model.dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = batch * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * CONTEXT
    weights = sum(weight.numel() for weight in weights_read(model))
    return {
        "op": "step",
        "shape": name,
        "tokens": batch,
        "hidden": config.hidden_size,
        "outputs": config.vocab_size,
        "dtype": dtype,
        "mode": "step",
        "copies": 1,
        "bytes": (weights + cached) * size,
        "flops": 2 * batch * weights,
        "context": CONTEXT,
        "cache_bytes": cached * size,
    }


def time_case(models: dict, batch: int, args: argparse.Namespace) -> dict:
    """Results of all variants by name. Every sample of STEPS steps begins with the same context."""
    import torch

    on_gpu, plain = args.device == "cuda", models[PLAIN]
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    prompt = torch.randint(0, plain.config.vocab_size, (batch, CONTEXT), device=plain.device)
    ready, rewinds, failed = variants_of(models, prompt, args)
    if on_gpu:
        ready |= floors(plain)

    def rewind_all() -> None:
        for rewind in rewinds:
            rewind()
        wait()

    def timed(call):
        """The last step of a sample waits for the device; call 0, which is not timed, does too."""

        def step(i: int) -> None:
            call()
            if i % STEPS == 0:
                wait()

        return step

    results = time_cpu(
        {variant: timed(call) for variant, call in ready.items()},
        seconds=0.5 if args.quick else 1.0,
        rounds=4,
        batch=STEPS,
        between=rewind_all,
        settle=0.0 if on_gpu else 0.1,
    )
    return results | failed


def time_model(name: str, dtype: str, args: argparse.Namespace, report: Report) -> None:
    """One model with every batch. Its memory is free afterwards."""
    import torch

    models = twins(name, dtype, args.device, args.layers)
    for batch in args.tokens or BATCHES:
        report.add(case_of(models[PLAIN], name, batch, dtype), time_case(models, batch, args))
        if args.device == "cuda":
            torch.cuda.empty_cache()


def run(args: argparse.Namespace, report: Report) -> None:
    """Every dtype x model."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        for dtype in args.dtype:
            for name in args.shapes or (NAMES[:1] if args.quick else NAMES):
                time_model(name, dtype, args, report)
