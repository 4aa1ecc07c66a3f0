"""Shapes with names: those of real models, and those at which kernels break, each with its reason."""

from typing import NamedTuple


class QKVShape(NamedTuple):
    """One RMSNorm + QKV projection: x [tokens, hidden] -> [tokens, qkv]."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    reason: str = ""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv(self) -> int:
        return self.q_size + 2 * self.kv_size


class LinearShape(NamedTuple):
    """One linear layer: x [tokens, hidden] -> [tokens, outputs]."""

    name: str
    hidden: int
    outputs: int
    reason: str = ""


class NormShape(NamedTuple):
    """One RMSNorm over x [tokens, hidden]."""

    name: str
    tokens: int
    hidden: int
    reason: str = ""


MODELS = (
    QKVShape("qwen2.5-0.5b", 896, 14, 2, 64, bias=True, reason="hidden is no power of two; has a bias"),
    QKVShape("qwen3-0.6b", 1024, 16, 8, 128, reason="q is wider than hidden"),
    QKVShape("qwen3-4b", 2560, 32, 8, 128, reason="q is wider than hidden"),
    QKVShape("qwen3-8b", 4096, 32, 8, 128, reason="the wq of the model is square"),
    QKVShape("qwen3-14b", 5120, 40, 8, 128, reason="hidden is no power of two"),
    QKVShape("llama-70b", 8192, 64, 8, 128, reason="the largest"),
)

# The width of the MLP of each, and the words that it knows.
_MLP_AND_VOCABULARY = {
    "qwen2.5-0.5b": (4864, 151_936),
    "qwen3-0.6b": (3072, 151_936),
    "qwen3-4b": (9728, 151_936),
    "qwen3-8b": (12_288, 151_936),
    "qwen3-14b": (17_408, 151_936),
    "llama-70b": (28_672, 128_256),
}
PROJECTIONS = tuple(  # what closes the halves of a layer
    LinearShape(f"{shape.name}-{name}", hidden, shape.hidden, reason)
    for shape in MODELS
    for name, hidden, reason in (
        ("o", shape.q_size, "after attention"),
        ("down", _MLP_AND_VOCABULARY[shape.name][0], "after the MLP"),
    )
)
HEADS = tuple(
    LinearShape(f"{shape.name}-head", shape.hidden, _MLP_AND_VOCABULARY[shape.name][1], "a language model's head")
    for shape in MODELS
)
GATE_UPS = tuple(
    LinearShape(f"{shape.name}-gate_up", shape.hidden, 2 * _MLP_AND_VOCABULARY[shape.name][0], "gate and up of the MLP")
    for shape in MODELS
)

# Small, so that a test can run the product of all of them with every kernel, dtype and layout.
QKV_EDGES = (
    QKVShape("one", 1, 1, 1, 1, reason="a single number everywhere"),
    QKVShape("three", 3, 1, 1, 1, reason="square 3 x 3: shape cannot tell the layout, nothing fills a vector"),
    QKVShape("odd", 37, 3, 1, 5, bias=True, reason="prime hidden, odd head_dim: every row of the weight is misaligned"),
    QKVShape("below-vector", 7, 2, 1, 8, reason="hidden below any vector"),
    QKVShape("one-vector", 16, 1, 1, 16, reason="hidden is one 512-bit vector of float32"),
    QKVShape("vector+1", 33, 1, 1, 8, bias=True, reason="hidden is one past a 512-bit vector of bfloat16"),
    QKVShape("vector-1", 255, 2, 1, 16, reason="hidden is one short of a whole number of vectors"),
    QKVShape("odd-outputs", 64, 1, 1, 7, bias=True, reason="21 outputs: a ragged tile of outputs under a whole hidden"),
    QKVShape("multi-query", 96, 12, 1, 8, reason="one key head; the head counts divide"),
    QKVShape("sharded", 128, 5, 3, 16, bias=True, reason="head counts that do not divide: tensor-parallel ranks"),
    QKVShape("more-kv", 80, 1, 4, 10, reason="more key heads than query heads; head_dim is no multiple of 4"),
    QKVShape("square", 192, 4, 1, 32, bias=True, reason="qkv == hidden: the layout has to be said"),
    QKVShape("tall", 1100, 1, 1, 2, reason="long sums, very few outputs; hidden is a multiple of 4 but not of 8"),
    QKVShape("wide", 8, 40, 8, 10, reason="short sums, many outputs"),
)

NORMS = (
    NormShape("decode-1024", 1, 1024, "one token"),
    NormShape("decode-4096", 128, 4096, "a decode batch"),
    NormShape("prefill-1024", 4096, 1024, "small rows, many"),
    NormShape("prefill-4096", 4096, 4096, "8B at prefill"),
    NormShape("prefill-1024-32k", 32768, 1024, "32k tokens"),
    NormShape("prefill-4096-32k", 32768, 4096, "32k tokens"),
    NormShape("prefill-8192-32k", 32768, 8192, "70B at 32k tokens"),
    NormShape("wide-16384", 16384, 16384, "rows past the registers of a block"),
)

NORM_EDGES = (
    NormShape("one", 1, 1, "a single number"),
    NormShape("three", 5, 3, "below any vector"),
    NormShape("five", 3, 5, "one past 8 bytes of bfloat16"),
    NormShape("seven", 2, 7, "one short of 16 bytes of bfloat16"),
    NormShape("head-64", 33, 64, "a per-head norm"),
    NormShape("head-128", 17, 128, "a per-head norm"),
    NormShape("prime", 4, 127, "prime, misaligns every other row"),
    NormShape("vector-1", 3, 255, "one short of whole vectors"),
    NormShape("vector+1", 3, 257, "one past whole vectors"),
    NormShape("multiple-of-4", 2, 1100, "a multiple of 4 but not of 8"),
    NormShape("not-of-4", 2, 1026, "a multiple of 2 only: kernels that load four at a time drop this tail"),
    NormShape("past-4096", 2, 4100, "past 4096: kernels that keep a row in registers may ignore these columns"),
    NormShape("past-8192", 2, 8200, "past 8192: the same, with 16-bit numbers"),
    NormShape("past-8192-odd", 2, 8193, "past 8192, misaligned"),
    NormShape("past-16384", 1, 16392, "past what a block keeps in registers of float32"),
    NormShape("past-32768", 1, 32776, "past what it keeps there of 16 bits"),
    NormShape("past-65536", 1, 65538, "past what shared memory holds in float32"),
)


def model(name: str) -> QKVShape:
    """The model shape called `name`; KeyError lists the names."""
    for shape in MODELS:
        if shape.name == name:
            return shape
    raise KeyError(f"no model shape {name!r}; there are {', '.join(shape.name for shape in MODELS)}")
