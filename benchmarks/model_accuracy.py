"""How exact a whole model decodes: the logits and caches of Decoders against the same model in float32.

All models have the same random weights and are fed the same tokens: prompts of many lengths, several in a batch and
padded on the left, then one token at a time, in a Decoder, which is a CUDA graph on a GPU. `transformers` is the model
in the dtype without minivllm, `minivllm` the one with minivllm.transformers.apply, `minivllm hf` with the rounding of
transformers. The reference is the float32 model of transformers without a Decoder: one forward of every whole text by
itself, without TF32 and with torch's attention in plain operations.

The error at a position is the length of the difference of the logits over the length of float32's. Models are compared
in pairs: at every position of a prompt by how much one's error exceeds that of transformers, averaged over the prompt;
prompts are independent samples, so the standard error and the bound of the mean are over prompts. The rest are errors
of keys and values by layer, texts that the models choose themselves, and what has to be the same bit for bit.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.model import HF, NAMES, OURS, PLAIN, each_model, label
from benchmarks.report import Report
from minivllm.testing.models import OUTLIER

SEED = 21
SURE = 0.95  # of the bound of a difference, one-sided
METHOD = {
    "logits": "error over length of float32's logits: mean over positions, then mean and deviation over prompts; "
    f"difference_bound: mean difference and {statistics.NormalDist().inv_cdf(SURE):.3f} standard errors",
    "cache": "root of the squared errors over the squares of float32's keys (values), by layer, over all rows",
    "rollouts": "share of the chosen tokens that float32 chooses after the same text",
    "weights": f"random, seed 0; one channel of every fourth k_norm is {OUTLIER}; tokens: seed {SEED}",
}


class Plan(NamedTuple):
    """How much is run. Lengths of prompts go from shortest to longest in even steps, `steps` tokens follow each."""

    prompts: int
    batch: int
    shortest: int
    longest: int
    steps: int
    rollouts: int
    rollout_length: int

    def lengths(self) -> list[int]:
        span = self.longest - self.shortest
        return [self.shortest + i * span // (self.prompts - 1) for i in range(self.prompts)]

    def batches(self) -> list[list[int]]:
        """The prompts of each batch, by number: every batch has short and long ones."""
        count = self.prompts // self.batch
        return [list(range(first, self.prompts, count)) for first in range(count)]


LONG = Plan(prompts=64, batch=16, shortest=16, longest=3900, steps=100, rollouts=4, rollout_length=4000)
SMALL = Plan(prompts=8, batch=4, shortest=3, longest=120, steps=8, rollouts=2, rollout_length=64)
GROUPS = 4  # of prompts, by length: each has rows of its own


class Text(NamedTuple):
    """A batch: prompts padded on the left, their mask, how long each is, and the tokens [batch, steps] behind them."""

    ids: Any
    mask: Any
    lengths: list[int]
    fed: Any

    def alone(self, row: int) -> "Text":
        """One of the prompts, by itself and without padding."""
        ids, length = self.ids[row : row + 1], self.lengths[row]
        return Text(ids[:, -length:], self.mask[row : row + 1, -length:], [length], self.fed[row : row + 1])


def temper(model) -> None:
    """Scales random weights so that errors go through the layers as through those of a model that works. As they are
    drawn, the first layer outweighs the embedding many times, and a head attends to one token only where its k_norm has
    an outlier, or to all tokens alike where it has none: errors then grow, or vanish, from layer to layer.

    What joins the residual is scaled by 1 / sqrt(2 layers), as GPT-2's initialisation does. The weights of q_norm and
    k_norm lie around 1.6, so that scores have a deviation of 2.5. Every fourth k_norm has a channel of OUTLIER; its
    partner in q_norm is so small that this channel moves the scores as much as all others together.
    """
    layers = model.model.layers
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        for linear in (attention.o_proj, layer.mlp.down_proj):
            linear.weight.mul_((2 * len(layers)) ** -0.5)
        if not hasattr(attention, "k_norm"):
            continue
        q_norm, k_norm = attention.q_norm.weight, attention.k_norm.weight
        outlier = int(k_norm.argmax())
        for weight in (q_norm, k_norm):
            weight.normal_(1.6, 0.3)
        if number % 4 == 0:
            k_norm[outlier] = OUTLIER
            q_norm[outlier] = 1.6**2 * len(k_norm) ** 0.5 / OUTLIER


def texts(plan: Plan, vocabulary: int, device) -> Iterator[tuple[list[int], Text]]:
    """(the numbers of its prompts, a batch), one after the other."""
    import torch

    generator, lengths = torch.Generator().manual_seed(SEED), plan.lengths()
    for prompts in plan.batches():
        own = [lengths[prompt] for prompt in prompts]
        ids = torch.randint(0, vocabulary, (len(own), max(own)), generator=generator)
        mask = (torch.arange(max(own)) >= max(own) - torch.tensor(own)[:, None]).long()
        fed = torch.randint(0, vocabulary, (len(own), plan.steps), generator=generator)
        yield prompts, Text((ids * mask).to(device), mask.to(device), own, fed.to(device))


def whole_text(exact, ids, keep: int):
    """One forward of the float32 model: (logits [keep, vocabulary] of the last tokens, its cache)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels may split float32 into narrower parts
        out = exact(ids, use_cache=True, logits_to_keep=keep)
    return out.logits[0], out.past_key_values


def decoded(decoder, text: Text) -> Iterator:
    """Logits [batch, vocabulary] after the prompts and after every token fed; each holds until the next."""
    yield decoder.prefill(text.ids, text.mask)
    for tokens in text.fed.unbind(1):
        yield decoder.step(tokens)


def all_decoded(decoder, text: Text):
    """[positions, batch, vocabulary]"""
    import torch

    return torch.stack([logits.clone() for logits in decoded(decoder, text)])


class Errors:
    """What one model gets wrong: by prompt the errors of its logits and how often it chooses as float32; by layer the
    squares of the errors of keys and values beside the squares of float32's."""

    def __init__(self, prompts: int, layers: int):
        self.errors: list[list[float]] = [[] for _ in range(prompts)]
        self.agreed = [0] * prompts
        self.squares = {name: [[0.0, 0.0] for _ in range(layers)] for name in ("keys", "values")}

    def add_logits(self, prompts: list[int], logits, true) -> None:
        """logits, true: [batch, vocabulary] at one position of each prompt."""
        same = (logits.argmax(-1) == true.argmax(-1)).tolist()
        wide = true.double()
        errors = ((logits.double() - wide).norm(dim=-1) / wide.norm(dim=-1)).tolist()
        for prompt, error, agreed in zip(prompts, errors, same, strict=True):
            self.errors[prompt].append(error)
            self.agreed[prompt] += agreed

    def add_cache(self, row: int, cache, true) -> None:
        """The rows of one sequence, which is alone in the cache `true`."""
        for number, (layer, exact) in enumerate(zip(cache.layers, true.layers, strict=True)):
            for name, squares in self.squares.items():
                wanted = getattr(exact, name)[0].double()
                got = getattr(layer, name)[row, :, : wanted.shape[1]].double()
                squares[number][0] += float((got - wanted).square().sum())
                squares[number][1] += float(wanted.square().sum())

    def cache_errors(self) -> dict[str, list[float]]:
        return {f"{name}_error": [(e / t) ** 0.5 for e, t in squares] for name, squares in self.squares.items()}

    def row(self, plain: "Errors", prompts: range) -> dict:
        """Columns of some prompts, beside the errors of transformers."""
        each = [statistics.fmean(self.errors[prompt]) for prompt in prompts]
        more = [error - statistics.fmean(plain.errors[prompt]) for error, prompt in zip(each, prompts)]
        choices = sum(len(self.errors[prompt]) for prompt in prompts)
        difference, spread = statistics.fmean(more), statistics.stdev(more) / len(more) ** 0.5
        return {
            "mean_error": statistics.fmean(each),
            "error_deviation": statistics.stdev(each),
            "prompts": len(each),
            "difference": difference,
            "difference_error": spread,
            "difference_bound": difference + statistics.NormalDist().inv_cdf(SURE) * spread,
            "agreement": sum(self.agreed[prompt] for prompt in prompts) / choices,
            "choices": choices,
        }


def teacher_forced(exact, decoders: dict, plan: Plan, case: dict, report: Report) -> None:
    """Everybody is fed the same tokens: errors of logits by length of prompt, and of the caches."""
    import torch

    errors = {variant: Errors(plan.prompts, len(exact.model.layers)) for variant in decoders}
    for prompts, text in texts(plan, exact.config.vocab_size, exact.device):
        alone = [text.alone(row) for row in range(len(prompts))]
        true = [whole_text(exact, torch.cat([each.ids, each.fed], 1), plan.steps + 1) for each in alone]
        for variant, decoder in decoders.items():
            for position, logits in enumerate(decoded(decoder, text)):
                errors[variant].add_logits(prompts, logits, torch.stack([each[position] for each, _ in true]))
            for row, (_, cache) in enumerate(true):
                errors[variant].add_cache(row, decoder._cache, cache)
    size, lengths = plan.prompts // GROUPS, plan.lengths()
    groups = [range(first, first + size) for first in range(0, plan.prompts, size)]
    for group in (*groups, range(plan.prompts)):
        shortest, longest = lengths[group[0]], lengths[group[-1]]
        kind = f"{len(group)} prompts of {shortest:,} to {longest:,}, {plan.steps} steps"
        rows = {variant: found.row(errors[PLAIN], group) for variant, found in errors.items()}
        finish(case | {"kind": kind, "tokens": longest + plan.steps}, rows, report)
    rows = {variant: found.cache_errors() for variant, found in errors.items()}
    finish(case | {"kind": "keys and values", "tokens": plan.longest + plan.steps}, rows, report)


def compared(first, second) -> dict:
    """How many of some numbers there are twice, the share that is equal bit for bit, and how far apart they are."""
    wide = first.double()
    apart = float((second.double() - wide).norm() / wide.norm())
    return {"compared": first.numel(), "equal": float((first == second).double().mean()), "apart": apart}


def same_bits(models: dict, decoders: dict, plan: Plan, case: dict, report: Report) -> None:
    """The first batch once more, each of its prompts alone, and the batch after `undo`."""
    import torch

    import minivllm.transformers
    from minivllm.transformers import Decoder

    _, text = next(texts(plan, models[PLAIN].config.vocab_size, models[PLAIN].device))
    case = case | {"tokens": max(text.lengths) + plan.steps}
    first = {variant: all_decoded(decoders[variant], text) for variant in (PLAIN, OURS)}
    again, alone = {}, {}
    for variant, logits in first.items():
        again[variant] = compared(logits, all_decoded(decoders[variant], text))
        lone = Decoder(models[variant], 1, decoders[variant].max_length)
        each = [all_decoded(lone, text.alone(row)) for row in range(len(text.lengths))]
        alone[variant] = compared(logits, torch.cat(each, 1))
    finish(case | {"kind": "logits of the same batch once more"}, again, report)
    finish(case | {"kind": f"logits of each alone and in a batch of {plan.batch}"}, alone, report)
    minivllm.transformers.undo(models[OURS])
    bare = compared(first[PLAIN], all_decoded(decoders[OURS], text))
    minivllm.transformers.apply(models[OURS])
    finish(case | {"kind": "logits before apply and after undo"}, {OURS: bare}, report)


def rollouts(exact, models: dict, plan: Plan, case: dict, report: Report) -> None:
    """Each model goes on by itself; float32 reads what it wrote. minivllm's does so twice."""
    import torch

    from minivllm.transformers import Decoder

    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(0, exact.config.vocab_size, (plan.rollouts, plan.shortest), generator=generator)
    prompt, new = prompt.to(exact.device), plan.rollout_length - plan.shortest
    rows, written = {}, {}
    for variant in (OURS, f"{OURS} again", PLAIN):
        model = models[variant.removesuffix(" again")]
        decoder = Decoder(model, plan.rollouts, plan.rollout_length)
        written[variant] = torch.stack(list(decoder.generate(prompt, new, eos_token_id=[])), 1)
    same = compared(written[OURS], written.pop(f"{OURS} again"))
    for variant, tokens in written.items():
        agreed = 0
        for ids, chosen in zip(prompt, tokens.to(exact.device), strict=True):
            logits, _ = whole_text(exact, torch.cat([ids, chosen[:-1]])[None], new)
            agreed += int((logits.argmax(-1) == chosen).sum())
        distinct = statistics.fmean(len(set(each)) / new for each in tokens.tolist())
        rows[variant] = {"agreement": agreed / tokens.numel(), "choices": tokens.numel(), "distinct": distinct}
    case = case | {"kind": f"{plan.rollouts} rollouts to {plan.rollout_length:,} tokens", "tokens": plan.rollout_length}
    finish(case, rows, report)
    finish(case | {"kind": "tokens of the rollouts once more"}, {OURS: same}, report)


def finish(case: dict, rows: dict[str, dict], report: Report) -> None:
    """A row per variant, printed and kept."""
    print(f"\n{case['op']} {case['shape']} {case['dtype']}, {case['kind']} [{report.elapsed():.0f} s]")
    for variant, row in rows.items():
        print(f"  {variant:14} {', '.join(f'{name} {in_short(value)}' for name, value in row.items())}", flush=True)
    report.add_rows([case | {"variant": variant} | row for variant, row in rows.items()])


def in_short(value) -> str:
    """A figure for the screen; of a list its smallest and its largest."""
    if isinstance(value, list):
        return f"{min(value):.2e} .. {max(value):.2e}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(args: argparse.Namespace, report: Report) -> None:
    """Every model x dtype."""
    import torch

    from minivllm.transformers import Decoder

    torch.set_float32_matmul_precision("highest")

    def one(models: dict, name: str, dtype: str) -> None:
        plan = SMALL if args.quick or name.startswith("tiny") else LONG
        temper(models[PLAIN])
        exact = copy.deepcopy(models[PLAIN]).float()
        case = {"op": "model_accuracy", "shape": label(name, args), "dtype": dtype}
        case |= {"hidden": exact.config.hidden_size, "outputs": exact.config.vocab_size}
        room = plan.longest + plan.steps
        decoders = {variant: Decoder(models[variant], plan.batch, room) for variant in (PLAIN, OURS, HF)}
        teacher_forced(exact, decoders, plan, case, report)
        same_bits(models, decoders, plan, case, report)
        decoders.clear()
        rollouts(exact, models, plan, case, report)

    each_model(args, NAMES[:1], one)
