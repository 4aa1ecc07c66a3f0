"""A whole model of transformers with random weights: plain, and with minivllm.transformers applied.

Speed: a decode step (embedding to the next token, on a static cache that holds CONTEXT tokens) and a prefill of
PREFILL tokens, run eagerly, as a CUDA graph, and under torch.compile. All models share their weights' memory.

The graph is of the decode step. torch.compile takes seconds per layer, model and batch: time it with --layers. Of a
compiled prefill the plain model is timed twice, since `apply` leaves its graph as it is (docs/transformers.md).
model_accuracy.py has the errors of such models.
"""

import argparse
import copy
from collections.abc import Callable

from benchmarks.report import Report
from benchmarks.results import OURS
from minivllm.testing.timing import Failed, failure, time_cpu

NAMES = ("qwen3-0.6b", "qwen3-8b")
BATCHES = (1, 16)
CONTEXT, CACHE, PREFILL = 512, 1024, 2048
PLAIN = "transformers"
AGAIN = "transformers again"  # the same model, compiled anew: what differs is no difference between models
LINEAR = f"{OURS} and linear"  # the fused sum and norm, then torch's linear, however few tokens
HF = f"{OURS} hf"  # its norms round as those of transformers; only its errors are measured
VARIANTS = {OURS: {}, LINEAR: {"fused_tokens": 0}, HF: {"rounding": "hf"}}  # what `apply` is told
TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
METHOD = {
    "decode": f"us a step, from the call to the end on the device: {CONTEXT} tokens in a static cache of {CACHE}",
    "prefill": f"the same for {PREFILL} tokens per sequence and the last one's logits",
}


def twins(name: str, dtype: str, device: str, layers: int | None) -> dict:
    """By variant, over the same weights: the plain model and those of VARIANTS. layers: the first so many only; None:
    all."""
    import minivllm.transformers
    from minivllm.testing.models import causal_lm

    plain = causal_lm(name, TORCH_DTYPES[dtype], device, **({"num_hidden_layers": layers} if layers else {}))
    models = {PLAIN: plain}
    for variant, options in VARIANTS.items():
        shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
        models[variant] = copy.deepcopy(plain, shared)
        report = minivllm.transformers.apply(models[variant], **options)
        if report.left_alone:
            raise RuntimeError(repr(report))
    return models


def label(name: str, args: argparse.Namespace) -> str:
    return f"{name}, {args.layers} layers" if args.layers else name


def each_model(args: argparse.Namespace, names: tuple[str, ...], one: Callable[[dict, str, str], None]) -> None:
    """one(twins, name, dtype) for every dtype and model; the memory of a model is free before the next one comes."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        for dtype in args.dtype:
            for name in args.shapes or (names[:1] if args.quick else names):
                one(twins(name, dtype, args.device, args.layers), name, dtype)
                if args.device == "cuda":
                    torch.cuda.empty_cache()


def each_case(
    args: argparse.Namespace, names: tuple[str, ...], batches: tuple[int, ...], contexts: tuple[int, ...],
    one: Callable[[dict, dict, int, int], None]
) -> None:  # fmt: skip
    """one(twins, columns of the model, batch, context) for each of them; the arguments come before the defaults."""
    import torch

    def of_model(models: dict, name: str, dtype: str) -> None:
        config = models[PLAIN].config
        case = {"shape": label(name, args), "hidden": config.hidden_size, "outputs": config.vocab_size, "dtype": dtype}
        for context in args.contexts or contexts:
            for batch in args.tokens or batches:
                one(models, case, batch, context)
                if args.device == "cuda":
                    torch.cuda.empty_cache()

    each_model(args, names, of_model)


class Sequences:
    """A batch of sequences in a model: tokens [batch, 1] is what `step` feeds, and then replaces by the next choice."""

    def __init__(self, model, batch: int, length: int):
        import torch
        import transformers

        self.model, self.device = model, model.device
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)

    def fill(self, ids):
        """Starts anew with some prompts."""
        self.cache.reset()
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)

    def feed(self, ids):
        """The choice behind the last of some tokens takes their place."""
        logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.tokens.copy_(logits.argmax(-1))

    def step(self):
        self.feed(self.tokens)

    def rewind(self, length: int):
        """Forgets every token beyond `length`."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)


def graphed(sequences: Sequences, call, length: int):
    """The replay of a CUDA graph of `call`, which starts with `length` tokens in the cache."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
            sequences.rewind(length)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    sequences.rewind(length)
    return graph.replay


def compiled(sequences: Sequences, ids, device: str):
    """`feed` under torch.compile, in the mode that is best for decode where there is a GPU."""
    import torch

    mode = {"mode": "reduce-overhead"} if device == "cuda" else {}
    choose = torch.compile(
        lambda ids, cache: sequences.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1),
        fullgraph=True,
        **mode,
    )
    return lambda: sequences.tokens.copy_(choose(ids, sequences.cache))


def time_mode(mode: str, sequences: dict[str, Sequences], ids: dict, length: int, rounds: int, args) -> dict:
    """Feeding `ids`, by variant, in one mode and in turns; the caches are rewound to `length` off the clock."""
    import torch

    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    ready, results = {}, {}
    torch.compiler.reset()
    for name, each in sequences.items():
        try:
            call = lambda each=each, name=name: each.feed(ids[name])  # noqa: E731
            if mode == "graph":
                call = graphed(each, call, length)
            elif mode == "compile":
                call = compiled(each, ids[name], args.device)
                for _ in range(3):
                    call()
                    each.rewind(length)
            ready[name] = lambda i, call=call: (call(), wait())
        except Exception as error:
            results[name] = failure(error)

    def between():
        for each in sequences.values():
            each.rewind(length)
        wait()

    settle = {"settle": 0.0} if args.device == "cuda" else {}
    timed = time_cpu(ready, seconds=0.6 if args.quick else 1.2, rounds=rounds, batch=1, between=between, **settle)
    return {name: results.get(name) or timed[name] for name in sequences}


def works(args: argparse.Namespace):
    """(decode or prefill, batch, mode), the dearest last. Quick: one batch of the dear."""
    batches = args.tokens or BATCHES
    modes = args.modes or ["eager", "graph"] + ["compile"] * (args.compile is not None)
    for mode in modes:
        if mode == "graph" and args.device == "cpu":
            continue
        for work in ("decode",) if mode == "graph" else ("decode", "prefill"):
            dear = work == "prefill" or mode == "compile"
            for batch in batches[:1] if args.quick and dear else batches:
                yield work, batch, mode


def time_model(name: str, dtype: str, models: dict, args: argparse.Namespace, report: Report) -> None:
    import torch

    config, parameters = models[PLAIN].config, models[PLAIN].num_parameters()
    context, cache, prefill = (CONTEXT, CACHE, PREFILL) if not name.startswith("tiny") else (16, 32, 64)
    for work, batch, mode in works(args):
        length, room = (context, cache) if work == "decode" else (0, prefill)
        prompt = torch.randint(0, config.vocab_size, (batch, room), device=models[PLAIN].device)
        wanted = [PLAIN, OURS] + [LINEAR] * ((work, mode, batch) == ("prefill", "eager", 1))
        wanted += [AGAIN] * ((work, mode) == ("prefill", "compile"))
        sequences = {variant: Sequences(models.get(variant, models[PLAIN]), batch, room) for variant in wanted}
        for each in sequences.values():
            each.fill(prompt[:, : length or 1])  # the cache comes into being outside of any graph
            each.rewind(length)
        ids = {variant: each.tokens if work == "decode" else prompt for variant, each in sequences.items()}
        results = time_mode(mode, sequences, ids, length, 4 if work == "decode" else 2, args)
        tokens = batch if work == "decode" else batch * room
        case = {"op": "model", "shape": label(name, args), "tokens": tokens, "batch": batch}
        case |= {"hidden": config.hidden_size}
        case |= {"outputs": config.vocab_size, "dtype": dtype, "mode": f"{work}, {mode}", "copies": 1}
        case |= {"bytes": parameters * models[PLAIN].dtype.itemsize, "flops": 2 * parameters * tokens}
        report.add(case, results)
        print_speed(case, results)


def print_speed(case: dict, results: dict) -> None:
    times = {name: result.us for name, result in results.items() if not isinstance(result, Failed)}
    rates = ", ".join(f"{name} {case['tokens'] / us * 1e6:.1f} tok/s" for name, us in times.items())
    ratio = f", {times[PLAIN] / times[OURS]:.2f}x" if {PLAIN, OURS} <= set(times) else ""
    print(f"  batch {case['batch']}, {case['mode']}: {rates}{ratio}", flush=True)


def run(args: argparse.Namespace, report: Report) -> None:
    """Every model x dtype."""
    import torch

    torch.manual_seed(20)
    each_model(args, NAMES, lambda models, name, dtype: time_model(name, dtype, models, args, report))
