"""What a case is, and what the draws of all ops share.

Most calls are small, so that there are many of them: odd sizes, and every way in which tensors may lie. They cannot
show what goes wrong only in a long row, such as a ring of copies in a GPU's shared memory, which must be full several
times over. So of the draws for a GPU a third are `model_like`: they have the hidden sizes, outputs and tokens of
models. Most of these are `tidy`, as the kernels on tensor cores ask for it."""

import functools
import inspect
import math
import random
from typing import NamedTuple

import minivllm
from fuzz.layouts import Block, Layouts, Spec
from fuzz.values import ITEMSIZE, POOL, PRIME, TAME, WILD

DTYPES = ("f32", "f16", "bf16")
LONG = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
USABLE = [row for row in minivllm.kernels() if row.usable]
MODEL_LIKE = 1 / 3  # of the draws for a GPU
MODEL_BYTES = 64 << 20  # of a weight at most: twelve processes with several copies of it share a GPU
MODEL_HIDDEN = (896, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 8192)
PARAMETER_KINDS = ("near one", "small", "normal", "near one", "small", "every exponent")


class Refused(NamedTuple):
    exception: type | tuple
    message: str  # a pattern


class Case(NamedTuple):
    name: str  # SEED:INDEX
    op: str
    device: str
    tensors: dict  # argument -> Spec, or a tuple of two or three
    options: dict  # the other arguments
    blocks: list[Block]
    outputs: dict  # result -> the argument that it is written to, where one is given
    threads: int
    wild: bool  # holds what is not finite, or numbers from the ends of the range
    refused: Refused | None = None
    may_refuse: str | None = None  # a forced kernel need not fit: what the message says then

    def specs(self) -> list[Spec]:
        """Every tensor, the members of a tuple one by one."""
        return [spec for specs in self.tensors.values() for spec in members(specs)]

    def judged_by(self) -> dict:
        """The options that say how accurate a result must be: only GPUs multiply in TF32."""
        return {name: value for name, value in self.options.items() if name != "allow_tf32" or self.device == "cuda"}

    def fits_torch(self) -> bool:
        """It has no negative strides."""
        return all(stride >= 0 for spec in self.specs() for stride in spec.strides)

    def __str__(self):
        lines = [f"{self.name}  {self.op}  threads={self.threads}  {self.options}"]
        for argument, specs in self.tensors.items():
            for spec in members(specs):
                at = "against the guard page behind" if self.blocks[spec.block].at_end else "from the guard page on"
                lines.append(
                    f"    {argument}: {spec.dtype} {list(spec.shape)}, strides {list(spec.strides)}, block {spec.block} "
                    f"({at}), offset {spec.offset}"
                )
        return "\n".join(lines)


@functools.cache
def parameters(op: str) -> frozenset:
    """The names that an op takes; of a layer, its class's and its call's."""
    function = getattr(minivllm, op)
    names = set(inspect.signature(function).parameters)
    if inspect.isclass(function):
        names |= set(inspect.signature(function.__call__).parameters) - {"self"}
    return frozenset(names)


@functools.cache
def forceable(op: str, dtype: str, device: str) -> tuple:
    listed = {"fused_add_rms_norm": "add_rms_norm", "FusedRMSNormQKV": "rms_norm_qkv"}.get(op, op)
    return tuple(
        row.name
        for row in USABLE
        if row.op == listed and row.dtype == LONG[dtype] and row.isa.startswith("sm") == (device == "cuda")
    )


class Drawing:
    """What the draws of all ops share."""

    def __init__(self, op: str, rng: random.Random, device: str):
        self.op, self.rng, self.device = op, rng, device
        self.large = rng.random() < 0.01  # enough work for several threads
        self.model_like = device == "cuda" and rng.random() < MODEL_LIKE
        self.tidy = self.model_like and rng.random() < 0.8  # contiguous, and in one dtype
        scale = 16 if device == "cuda" else 1
        self.most_elements = 1 << 23 if self.model_like else scale << (18 if self.large else 13)  # of x or of a result
        self.most_products = 1 << 32 if self.model_like else scale << (24 if self.large else 18)
        self.wild = rng.random() < 0.25
        self.dtype = rng.choice(DTYPES)
        self.most_weights = MODEL_BYTES // ITEMSIZE[self.dtype] if self.model_like else self.most_products // 4
        kinds, period = TAME + WILD if self.wild else TAME, PRIME if self.model_like else POOL
        self.at = Layouts(rng, kinds, self.wild, self.tidy, period)
        self.tensors: dict = {}
        self.options: dict = {}
        self.refused: Refused | None = None
        self.spoil = rng.random() < 0.04

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def hidden(self) -> int:
        rng, kind = self.rng, self.rng.random()
        if self.model_like:
            return 64 * rng.randint(14, 128) if kind < 0.5 else rng.choice(MODEL_HIDDEN)
        if kind < 0.5:
            return rng.randint(1, 70)
        if kind < 0.8:
            return rng.choice((32, 64, 96, 128, 160, 256, 384)) + rng.choice((-1, 0, 0, 1))
        if kind < 0.98:
            return rng.randint(71, 700)
        return rng.choice((1024, 2047, 3001, 4096, 5125, 8192, 9000))

    def heads(self, hidden: int) -> tuple[int, int, int]:
        """How many heads q has, how many k and v have, and the size of each."""
        rng = self.rng
        if self.model_like:
            kv_heads, head_dim = rng.choice((1, 2, 4, 8)), rng.choice((64, 128))
            most = self.most_weights // (hidden * head_dim) - 2 * kv_heads
            return max(1, min(kv_heads * rng.randint(1, 8), most)), kv_heads, head_dim
        heads, kv_heads = rng.randint(1, 5), rng.randint(1, 3)
        head_dim = rng.choice((1, 2, 3, 4, 5, 7, 8, 8, 10, 12, 16, 16, 20, 32, 64, 128))
        most = self.most_weights // 2 // ((heads + 2 * kv_heads) * hidden)
        return heads, kv_heads, max(1, min(head_dim, most))

    def outputs(self, hidden: int) -> int:
        """Of a linear layer."""
        rng, most = self.rng, self.most_weights // hidden
        if self.model_like:
            outputs = 64 * rng.randint(8, max(8, min(384, most // 64)))
        else:
            outputs = rng.choice(
                (rng.randint(1, 70), rng.choice((64, 128, 192, 256)) + rng.randint(-1, 1), rng.randint(1, 500))
            )
        if rng.random() < 0.1 and hidden <= most:
            outputs = hidden
        return max(1, min(outputs, most))

    def lead(self, most: int) -> tuple:
        """Leading dimensions with at most so many rows in all, now and then none."""
        rng = self.rng
        if self.model_like:  # one token, those of a few sequences, and prompts: each has kernels of its own
            tokens = rng.choice((1, rng.randint(2, 16), rng.randint(17, 64), rng.randint(65, 300)))
            tokens = max(1, min(tokens, most))
            return rng.choice(((tokens,), (1, tokens), (tokens, 1)))
        lead = []
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 6))):
            size = min(rng.choice((1, 1, 2, 2, 3, 4, 5, 7)), max(1, most // max(math.prod(lead), 1)))
            lead.append(size)
        if lead and rng.random() < 0.3:
            lead[rng.randrange(len(lead))] *= max(1, min(rng.randint(1, 40), most // math.prod(lead)))
        if lead and rng.random() < 0.02:
            lead[rng.randrange(len(lead))] = 0
        return tuple(lead)

    def parameter_dtype(self) -> str:
        return "f32" if not self.tidy and self.chance(0.2) else self.dtype

    def parameter_kind(self) -> str:
        return self.rng.choice(PARAMETER_KINDS if self.wild else PARAMETER_KINDS[:5])

    def vector(self, size: int) -> Spec:
        spec = self.at.place((size,), self.parameter_dtype(), (1,))
        return self.at.fill(spec, self.parameter_kind())

    def give(self, **options):
        """Options, where the op has them: what is not named yet of an op that gets it later is drawn from then on."""
        self.options |= {name: value for name, value in options.items() if name in parameters(self.op)}

    def numbers(self):
        rng = self.rng
        if rng.random() < 0.7:
            self.give(eps=rng.choice((1e-6, 1e-5, 1e-12, 0.0, 0.125, 1.0, 1e4)))
        if rng.random() < 0.5:
            self.give(rounding=rng.choice(("hf", "hf_once", "fp32")))
        if rng.random() < 0.3:
            self.give(weight_offset=rng.choice((1.0, 1.0, 0.0, -1.0, 0.5, 2.0**-10)))
        names = forceable(self.op, self.dtype, self.device)
        if names and rng.random() < 0.4:
            self.give(kernel=rng.choice(names))

    def layer_options(self):
        rng = self.rng
        if rng.random() < 0.3:
            self.give(batch_invariant=rng.random() < 0.8)
        if rng.random() < 0.1:
            self.give(allow_tf32=rng.random() < 0.5)
        if rng.random() < 0.3:
            self.give(static_weights=rng.random() < 0.5)

    def case(self, name: str, outputs: dict | None) -> Case:
        outputs = outputs or {name: name for name in ("out", "residual_out") if name in self.tensors}
        if self.refused:
            self.options.pop("kernel", None)
        kernel = self.options.get("kernel")
        may_refuse = None
        if kernel and (self.device == "cuda" or self.options.get("batch_invariant")):
            may_refuse = rf"kernel '{kernel}' cannot serve this call"
        threads = self.rng.choice((1, 1, 2, 3, 4)) if self.large else self.rng.choice((1, 2))
        return Case(name, self.op, self.device, self.tensors, self.options, self.at.blocks, outputs, threads, self.wild,
                    self.refused, may_refuse)  # fmt: skip


def members(specs) -> tuple:
    """The tensors of an argument, one or several."""
    return (specs,) if isinstance(specs, Spec) else specs
