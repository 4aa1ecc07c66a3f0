"""A whole model of transformers with random weights: plain, and with minivllm.transformers applied.

Speed: a decode step (embedding to the next token, on a static cache that holds CONTEXT tokens) and a prefill of
PREFILL tokens, run eagerly, as a CUDA graph, and under torch.compile. All models share their weights' memory.

The graph is of the decode step. torch.compile takes seconds per layer, model and batch: time it with --layers. Of a
compiled prefill the plain model is timed twice, since `apply` leaves its graph as it is (docs/transformers.md).

Accuracy, with either rounding of the norms: all are fed the same tokens as the same model in float32, prompts of
several lengths padded on the left, then one token at a time; what each would choose next is compared with what float32
would. Errors are RMS over the logits of a prompt; their mean and standard deviation over prompts, and the mean over
prompts of by how much minivllm's is larger, with the standard error of that mean.
"""

import argparse
import copy
import statistics

from benchmarks.report import Report
from benchmarks.results import OURS
from minivllm.testing.timing import Failed, failure, time_cpu

NAMES = ("qwen3-0.6b", "qwen3-8b")
BATCHES = (1, 16)
CONTEXT, CACHE, PREFILL = 512, 1024, 2048
PROMPTS, LONGEST, LONG_PROMPTS = 64, 64, 4
PLAIN = "transformers"
AGAIN = "transformers again"  # the same model, compiled anew: what differs is no difference between models
LINEAR = f"{OURS} and linear"  # the fused sum and norm, then torch's linear, however few tokens
HF = f"{OURS} hf"  # its norms round as those of transformers; its speed is not timed
VARIANTS = {OURS: {}, LINEAR: {"fused_tokens": 0}, HF: {"rounding": "hf"}}  # what `apply` is told
TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
METHOD = {
    "decode": f"us a step, from the call to the end on the device: {CONTEXT} tokens in a static cache of {CACHE}",
    "prefill": f"the same for {PREFILL} tokens per sequence and the last one's logits",
    "accuracy": f"RMS error of logits against float32, mean and deviation over prompts; {PROMPTS} prompts, left-padded",
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


class Sequences:
    """A batch of sequences in a model: tokens [batch, 1] is what `step` feeds, and then replaces by the next choice."""

    def __init__(self, model, batch: int, length: int):
        import torch
        import transformers

        self.model, self.device = model, model.device
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.more = {}  # attention mask and positions, where prompts are padded

    def fill(self, ids, **more):
        """Starts anew with some prompts; gives back the logits of all their tokens."""
        self.cache.reset()
        return self.model(ids, past_key_values=self.cache, **more).logits

    def feed(self, ids):
        """[batch, 1, vocabulary]: the logits behind the last of some tokens."""
        logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1, **self.more).logits
        self.tokens.copy_(logits.argmax(-1))
        if self.more:
            self.more["position_ids"].add_(1)
        return logits

    def step(self):
        return self.feed(self.tokens)

    def rewind(self, length: int):
        """Forgets every token beyond `length`."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)


def graphed(sequences: Sequences, call, length: int):
    """(replay, its result): a CUDA graph of `call`, which starts with `length` tokens in the cache."""
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
        result = call()
    sequences.rewind(length)
    return graph.replay, result


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
                call, _ = graphed(each, call, length)
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


def label(name: str, args: argparse.Namespace) -> str:
    return f"{name}, {args.layers} layers" if args.layers else name


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
            each.fill(prompt[:, : length or 1], logits_to_keep=1)  # the cache comes into being outside of any graph
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


class Errors:
    """What one model gets wrong, per prompt: squares of the errors of its logits, and how often its choice differs."""

    def __init__(self, prompts: int):
        self.squares, self.counts, self.agreed, self.choices = [0.0] * prompts, [0] * prompts, 0, 0

    def add(self, prompts, logits, true) -> None:
        """logits, true: [tokens, vocabulary]; prompts: of which prompt each token is."""
        squares = (logits.double() - true.double()).square().mean(-1).tolist()
        for prompt, square in zip(prompts, squares, strict=True):
            self.squares[prompt] += square
            self.counts[prompt] += 1
        self.agreed += int((logits.argmax(-1) == true.argmax(-1)).sum())
        self.choices += len(true)

    def each(self) -> list[float]:
        return [(square / count) ** 0.5 for square, count in zip(self.squares, self.counts)]

    def row(self, plain: "Errors") -> dict:
        errors = self.each()
        more = [error - other for error, other in zip(errors, plain.each())]
        several = len(errors) > 1
        figures = {"mean_error": statistics.fmean(errors), "prompts": len(errors)}
        figures["error_deviation"] = statistics.stdev(errors) if several else 0.0
        figures["difference"] = statistics.fmean(more)
        figures["difference_error"] = statistics.stdev(more) / len(more) ** 0.5 if several else 0.0
        return figures | {"agreement": self.agreed / self.choices, "choices": self.choices}


def padded_prompts(vocabulary: int, device):
    """(ids, attention mask, positions, lengths) of PROMPTS prompts, padded on the left to LONGEST tokens."""
    import torch

    lengths = [LONGEST - i * (LONGEST - 5) // (PROMPTS - 1) for i in range(PROMPTS)]
    generator = torch.Generator().manual_seed(21)
    ids = torch.randint(0, vocabulary, (PROMPTS, LONGEST), generator=generator).to(device)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : LONGEST - length] = 0
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0), lengths


def accuracy(name: str, dtype: str, models: dict, args: argparse.Namespace, report: Report) -> None:
    """Prompts, steps after them, and long prompts."""
    import torch

    steps = 32 if args.quick else 512
    exact = copy.deepcopy(models[PLAIN]).float()
    models = {variant: models[variant] for variant in (PLAIN, OURS, HF)}
    everyone = {"exact": exact} | models
    ids, mask, positions, lengths = padded_prompts(exact.config.vocab_size, exact.device)
    whole_mask = torch.cat([mask, mask.new_ones(PROMPTS, steps)], 1)
    runs = {variant: Sequences(model, PROMPTS, LONGEST + steps) for variant, model in everyone.items()}
    replays, logits = {}, {}
    for variant, run in runs.items():
        logits[variant] = run.fill(ids, attention_mask=whole_mask, position_ids=positions)
        run.more = {"attention_mask": whole_mask, "position_ids": positions[:, -1:] + 1}
        replays[variant] = run.step
        if args.device == "cuda":
            replay, result = graphed(run, run.step, LONGEST)
            replays[variant] = lambda replay=replay, result=result: (replay(), result)[1]
            run.fill(ids, attention_mask=whole_mask, position_ids=positions)
            run.more["position_ids"].copy_(positions[:, -1:] + 1)
    case = {"op": "model", "shape": label(name, args), "hidden": exact.config.hidden_size, "dtype": dtype}

    errors = {variant: Errors(PROMPTS) for variant in models}
    for row, length in enumerate(lengths):
        for variant, found in errors.items():
            found.add([row] * length, logits[variant][row, -length:], logits["exact"][row, -length:])
    finish(case | {"kind": f"{PROMPTS} prompts of {min(lengths)} to {LONGEST}", "tokens": LONGEST}, errors, report)

    errors = {variant: Errors(PROMPTS) for variant in models}
    fed = torch.randint(0, exact.config.vocab_size, (PROMPTS, steps)).to(exact.device)
    del logits
    for token in fed.split(1, 1):
        for run in runs.values():
            run.tokens.copy_(token)
        logits = {variant: replay() for variant, replay in replays.items()}
        for variant, found in errors.items():
            found.add(range(PROMPTS), logits[variant][:, 0], logits["exact"][:, 0])
    finish(case | {"kind": f"{steps} steps after them", "tokens": steps}, errors, report)

    errors = {variant: Errors(LONG_PROMPTS) for variant in models}
    length = 700 if name.startswith("tiny") else PREFILL
    for prompt in range(LONG_PROMPTS):
        long = torch.randint(0, exact.config.vocab_size, (1, length)).to(exact.device)
        true = exact(long).logits[0]
        for variant, model in models.items():
            errors[variant].add([prompt] * length, model(long).logits[0], true)
    finish(case | {"kind": f"{LONG_PROMPTS} prompts of {length}", "tokens": length}, errors, report)


def finish(case: dict, errors: dict[str, Errors], report: Report) -> None:
    rows = [case | {"variant": variant} | found.row(errors[PLAIN]) for variant, found in errors.items()]
    print(f"\nmodel {case['shape']} {case['dtype']}, {case['kind']}")
    for row in rows:
        spread = f"{row['mean_error']:.4e} +- {row['error_deviation']:.1e}"
        more = f"{row['difference']:+.1e} +- {row['difference_error']:.1e}"
        chosen = f"{100 * row['agreement']:.2f} % of the choices of float32"
        print(f"  {row['variant']:14} logits' error {spread} ({more}), {chosen}")
    report.add_rows(rows)


def run(args: argparse.Namespace, report: Report) -> None:
    """Every model x dtype; the accuracy part, with its float32 copy, is of the first model only, and of all layers."""
    import torch

    torch.manual_seed(20)
    names = args.shapes or (NAMES[:1] if args.quick else NAMES)
    with torch.inference_mode(False), torch.no_grad():
        for dtype in args.dtype:
            for name in names:
                models = twins(name, dtype, args.device, args.layers)
                if name == names[0] and not args.layers:
                    try:
                        accuracy(name, dtype, models, args, report)
                    except Exception as error:  # the speed is still worth having
                        case = {"op": "model", "shape": name, "tokens": 0, "dtype": dtype, "kind": "accuracy"}
                        report.add_rows([case | {"variant": OURS} | failure(error)._asdict()])
                        print(f"accuracy: {failure(error).error}")
                time_model(name, dtype, models, args, report)
                del models
                if args.device == "cuda":
                    torch.cuda.empty_cache()
