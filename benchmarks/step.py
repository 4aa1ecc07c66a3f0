"""A decode step of a whole model with random weights, from the embedding of a token to the choice of the next one, and
beside it the time of reading the weights.

floor: one kernel for each weight that a step reads, which only reads it, in the order of the layers, in a CUDA graph;
the fastest of several numbers of blocks. `floor with cache` also reads as many bytes as the context has keys and
values. `transformers` and `minivllm`: the model without and with minivllm.transformers.apply, in a Decoder, on a static
cache as a CUDA graph (static), on the CPU eagerly on transformers' own growing cache (eager), and under torch.compile
(--compile, on a GPU with reduce-overhead). All of them share their weights' memory. On the CPU llama.cpp is the peer of
one sequence where llama-cpp-python is installed (llama_peer.py).

The keys and values of the context are random numbers, since what a step takes does not depend on them.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.columns import CACHE_FLOOR, COMPILE, DECODER, EAGER, LLAMA, STATIC
from benchmarks.model import OURS, PLAIN, Sequences, compiled, each_case, graphed
from benchmarks.report import Report
from minivllm.testing.timing import Failed, failure, time_cpu

NAMES = ("qwen3-0.6b", "qwen3-8b")
BATCHES, CONTEXTS = (1, 16), (512,)
ROOM = 512  # rows of the cache behind the context
STEPS = {"cuda": 16, "cpu": 4}  # in one sample; a GPU's are queued
SHARE = 0.8  # of the free memory of a GPU, for all caches of a case
METHOD = {
    "step": f"us a step: {STEPS['cuda']} steps are queued (on the CPU {STEPS['cpu']} called), from the first call to "
    "the end on the device; variants in turns",
    "host_us": f"us a step of the host alone, which queues {STEPS['cuda']} steps while the device is behind",
    "memory_bytes": "what the Decoder holds beside the weights",
}


class Ready(NamedTuple):
    """A way to run steps: one step, what takes it back to the context, and its decoder where it has one."""

    step: Callable[[], Any]
    rewind: Callable[[], None]
    decoder: Any = None


def weights_read(model) -> list:
    """What one step reads: every matrix once, the head's too, where it is the embedding as well."""
    layers = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
    return [*layers, model.get_output_embeddings().weight]


def cache_bytes(model, tokens: int) -> int:
    """Of the keys and values of so many tokens."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize


def floors(model, cache, share: float) -> dict:
    """Replays of graphs that read the weights, without and with this share of a cache, by the blocks for each SM."""
    import torch

    from benchmarks import device_peers

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    weights = weights_read(model)
    rows = [x.view(-1)[: int(x.numel() * share)] for layer in cache.layers for x in (layer.keys, layer.values)]
    found = {}
    for name, tensors in {"floor": weights, CACHE_FLOOR: weights + rows}.items():
        for each in (1, 2, 4):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for tensor in tensors:
                    device_peers.read(tensor, sms * each, programmatic=True)
            found[f"{name} x{each}"] = graph.replay
    return found


def first_tokens(model, batch: int):
    import torch

    return torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)


def fill(cache) -> None:
    """Random numbers into keys and values that are there."""
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()


def static_step(model, batch: int, context: int, way: str = STATIC) -> Ready:
    sequences = Sequences(model, batch, context + ROOM)
    sequences.fill(first_tokens(model, batch))
    fill(sequences.cache)
    sequences.rewind(context)

    def rewind() -> None:
        sequences.rewind(context)

    if way == STATIC:
        return Ready(graphed(sequences, sequences.step, context), rewind)
    step = compiled(sequences, sequences.tokens, model.device.type)
    for _ in range(3):
        step()
        rewind()
    return Ready(step, rewind)


def compiled_step(model, batch: int, context: int) -> Ready:
    import torch

    torch.compiler.reset()
    return static_step(model, batch, context, COMPILE)


def eager_step(model, batch: int, context: int) -> Ready:
    """On the cache that grows by a copy in each step, as model.generate has it."""
    import transformers

    cache, tokens = transformers.DynamicCache(config=model.config), first_tokens(model, batch)
    model(tokens, past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = (x.expand(-1, -1, context, -1).clone() for x in (layer.keys, layer.values))
    fill(cache)
    kept = [(layer.keys, layer.values) for layer in cache.layers]

    def step() -> None:
        tokens.copy_(model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1))

    def rewind() -> None:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values

    return Ready(step, rewind)


def decoder_step(model, batch: int, context: int) -> Ready:
    """As `generate` queues it."""
    from minivllm.transformers import Decoder

    decoder = Decoder(model, batch, context + ROOM)
    decoder.prefill(first_tokens(model, batch))
    fill(decoder._cache)

    def rewind() -> None:
        decoder._positions.fill_(context)
        decoder._counts.zero_()
        decoder._length = context

    rewind()
    return Ready(lambda: decoder._advance(model), rewind, decoder)


def llama_step(model, context: int) -> Ready:
    import torch

    from benchmarks import llama_peer

    return Ready(*llama_peer.step(model, torch.randint(0, model.config.vocab_size, (context,)).tolist(), ROOM))


MAKERS = {STATIC: static_step, EAGER: eager_step, DECODER: decoder_step, COMPILE: compiled_step}


def wanted(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, way): what is left out first where memory is short comes last."""
    usual = STATIC if args.device == "cuda" else EAGER
    pairs = [(OURS, DECODER), (PLAIN, usual), (PLAIN, DECODER), (OURS, usual)]
    return pairs + [(PLAIN, COMPILE), (OURS, COMPILE)] * (args.compile is not None)


def variants_of(models: dict, batch: int, context: int, args: argparse.Namespace) -> tuple[dict[str, Ready], dict]:
    """(what runs, failures), by variant. Each has a cache of its own."""
    import torch

    each = cache_bytes(models[PLAIN], batch * (context + ROOM))
    room = None if args.memory is None else args.memory * 2**30
    if room is None and args.device == "cuda":
        room = SHARE * torch.cuda.mem_get_info()[0]
    ready, failed = {}, {}
    for number, (name, way) in enumerate(wanted(args), 1):
        variant = f"{name} {way}"
        if room is not None and number * each > room:
            sizes = f"{number} caches of {each / 2**30:.1f} GiB in {room / 2**30:.0f} GiB"
            failed[variant] = Failed(f"left out for lack of memory: {sizes}")
            continue
        try:
            ready[variant] = MAKERS[way](models[name], batch, context)
        except Exception as error:
            failed[variant] = failure(error)
    if args.device == "cpu" and batch == 1:
        missing = [package for package in ("llama_cpp", "gguf") if importlib.util.find_spec(package) is None]
        if missing:
            print(f"llama.cpp is no peer in this run: {' and '.join(missing)} cannot be imported.")
        else:
            try:
                ready[LLAMA] = llama_step(models[PLAIN], context)
            except Exception as error:
                failed[LLAMA] = failure(error)
    return ready, failed


def case_of(model, case: dict, batch: int, context: int) -> dict:
    """What a step of `batch` sequences reads: the weights, and what the cache holds of the context."""
    weights, cached = sum(weight.numel() for weight in weights_read(model)), cache_bytes(model, batch * context)
    read = weights * model.dtype.itemsize + cached
    more = {"mode": "step", "copies": 1, "bytes": read, "flops": 2 * batch * weights}
    return {"op": "step"} | case | {"tokens": batch} | more | {"context": context, "cache_bytes": cached}


def time_case(models: dict, batch: int, context: int, args: argparse.Namespace) -> tuple[dict, dict]:
    """(results, more columns) of all variants by name. Every sample begins with the same context."""
    import torch

    on_gpu, plain, ours = args.device == "cuda", models[PLAIN], f"{OURS} {DECODER}"
    steps = STEPS[args.device]
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    ready, failed = variants_of(models, batch, context, args)
    calls = {variant: each.step for variant, each in ready.items()}
    if on_gpu and ours in ready:
        calls |= floors(plain, ready[ours].decoder._cache, context / (context + ROOM))

    def rewind_all() -> None:
        for each in ready.values():
            each.rewind()
        wait()

    def timed(call):
        """The last step of a sample waits for the device; call 0, which is not timed, does too."""

        def step(i: int) -> None:
            call()
            if i % steps == 0:
                wait()

        return step

    seconds = 0.5 if args.quick else 1.0
    settle = 0.0 if on_gpu else 0.1
    results = time_cpu(
        {variant: timed(call) for variant, call in calls.items()},
        seconds=seconds, rounds=4, batch=steps, between=rewind_all, settle=settle)  # fmt: skip
    columns = {
        variant: {"memory_bytes": sum(each.decoder.memory.values())} for variant, each in ready.items() if each.decoder
    }
    if on_gpu:
        queued = {variant: lambda i, step=ready[variant].step: step() for variant in columns}
        for variant, timing in time_cpu(
            queued, seconds=seconds / 4, rounds=1, batch=steps, between=rewind_all, settle=settle
        ).items():
            columns[variant] |= {} if isinstance(timing, Failed) else {"host_us": round(timing.us, 4)}
    return results | failed, columns


def run(args: argparse.Namespace, report: Report) -> None:
    """Every dtype x model x context x batch."""

    def one(models: dict, case: dict, batch: int, context: int) -> None:
        results, columns = time_case(models, batch, context, args)
        report.add(case_of(models[PLAIN], case, batch, context), results, columns)

    each_case(args, NAMES, BATCHES, CONTEXTS, one)
