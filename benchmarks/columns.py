"""What stands in the columns of a table: numbers of one case as text, and Markdown of them."""

from collections.abc import Callable

from benchmarks.peers import COMPILE_MODES
from benchmarks.results import OURS, Case

Column = Callable[[Case], str]
COMPILED = tuple(COMPILE_MODES)
DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    decimals = max(0, digits - len(str(int(abs(value)))))
    return f"{value:.{decimals if abs(value) >= 1 else digits - 1}f}"


def ratio(over: float | None, under: float | None) -> str:
    return "" if over is None or under is None else f"{over / under:.2f}x"


def percent(part: float | None, whole: float | None) -> str:
    return "" if part is None or whole is None else f"{100 * part / whole:.0f} %"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def ours_us(case: Case) -> float | None:
    return case.us(OURS)


def floor_us(case: Case) -> float | None:
    """The fastest reading of the weights; of a step the variants are called `floor x1` and so on."""
    return case.us(*(name for name in case.rows if name.startswith(("read_floor", "floor x"))))


def copy_us(case: Case) -> float | None:
    return case.us("torch copy", "16-byte copy")


def bold(text: str) -> str:
    return f"**{text}**" if text else ""


def peak(case: Case, variant: str) -> str:
    return mebibytes(case.rows.get(variant, {}).get("peak_bytes"))


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f} MiB"


def gigabytes_per_second(case: Case) -> str:
    return number(case.any("bytes") / ours_us(case) / 1e3) if ours_us(case) else ""


def gpu(case: Case) -> str:
    """H100, H200, ...; nothing on the CPU."""
    return (case.run["environment"].get("gpu") or "").removeprefix("NVIDIA ").partition(" ")[0]


QKV_COLUMNS: dict[str, Column] = {
    "shape": lambda case: f"{case.shape} {case.any('hidden')} -> {case.any('outputs')}",
    "tokens": lambda case: str(case.tokens),
    "dtype": lambda case: case.dtype,
    "GPU": gpu,
    "minivllm": lambda case: bold(number(ours_us(case))),
    "torch pair": lambda case: number(case.us("torch")),
    "speed-up": lambda case: ratio(case.us("torch"), ours_us(case)),
    "torch.compile": lambda case: number(case.us(*COMPILED)),
    "GEMM alone": lambda case: number(case.us("gemm alone")),
    "Triton, one output per program": lambda case: number(case.us("triton per output")),
    "NumPy": lambda case: number(case.us("numpy")),
    "batch invariant": lambda case: number(case.us(f"{OURS} invariant")),
    "read floor": lambda case: number(floor_us(case)),
    "time / floor": lambda case: ratio(ours_us(case), floor_us(case)),
    "kernel": lambda case: f"`{case.rows[OURS].get('kernel', '')}`",
    "memory grows by": lambda case: peak(case, OURS),
    "torch's by": lambda case: peak(case, "torch"),
}
NOT_IN_OVERVIEW = ("batch invariant", "kernel")
OVERVIEW_COLUMNS = {head: column for head, column in QKV_COLUMNS.items() if head not in NOT_IN_OVERVIEW}
NOT_WITHOUT_A_NORM = ("batch invariant", "NumPy", "Triton, one output per program", "memory grows by", "torch's by")
LINEAR_COLUMNS = {head: column for head, column in QKV_COLUMNS.items() if head not in NOT_WITHOUT_A_NORM} | {
    "by default": lambda case: number(case.us(f"{OURS} not static")),
    "as two ops": lambda case: number(case.us(f"{OURS} two ops")),
}
NORM_COLUMNS: dict[str, Column] = {
    "tokens x hidden": lambda case: case.shape.replace("x", " x "),
    "dtype": lambda case: case.dtype,
    "naive": lambda case: number(case.us(*(name for name in case.rows if "naive" in name))),
    "minivllm": lambda case: bold(number(ours_us(case))),
    "the same, fresh outputs": lambda case: number(case.us(f"{OURS} fresh outputs")),
    "torch": lambda case: number(case.us("torch")),
    "speed-up, both fresh": lambda case: ratio(case.us("torch"), case.us(f"{OURS} fresh outputs")),
    "torch.compile": lambda case: number(case.us(*COMPILED)),
    "NumPy": lambda case: number(case.us("numpy")),
    "copy of the same bytes": lambda case: number(copy_us(case)),
    "share of the copy's rate": lambda case: percent(copy_us(case), ours_us(case)),
    "GB/s": gigabytes_per_second,
}

ATTENTION_COLUMNS: dict[str, Column] = {
    "heads / of k, v": lambda case: case.shape.replace("x", " / "),
    "batch": lambda case: str(case.tokens),
    "keys": lambda case: f"{case.context:,}",
    "dtype": lambda case: case.dtype,
    "GPU": gpu,
    "minivllm": lambda case: bold(number(ours_us(case))),
    "by default": lambda case: number(case.us(f"{OURS} not static")),
    "cuDNN, attention alone": lambda case: number(case.us("torch cudnn")),
    "FlashAttention, alone": lambda case: number(case.us("torch flash")),
    "FlashInfer, alone": lambda case: number(case.us("flashinfer", "flashinfer tensor cores")),
    "read floor": lambda case: number(floor_us(case)),
    "time / floor": lambda case: ratio(ours_us(case), floor_us(case)),
}


def tokens_per_second(case: Case, variant: str) -> str:
    us = case.us(variant)
    return "" if us is None else number(case.tokens / us * 1e6)


MODEL_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "batch": lambda case: str(case.any("batch")),
    "what": lambda case: case.mode or "",
    "transformers, tokens/s": lambda case: tokens_per_second(case, "transformers"),
    "minivllm, tokens/s": lambda case: bold(tokens_per_second(case, OURS)),
    "speed-up": lambda case: ratio(case.us("transformers"), ours_us(case)),
    "with torch's linear": lambda case: tokens_per_second(case, f"{OURS} and linear"),
}
MODEL_ACCURACY_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "prompts": lambda case: case.kind or "",
    "error of transformers": lambda case: mean_error(case, "transformers"),
    "error of minivllm": lambda case: mean_error(case, OURS),
    "difference": lambda case: difference(case, OURS),
    "95 % bound of it": lambda case: difference_bound(case, OURS),
    'error with `rounding="hf"`': lambda case: mean_error(case, f"{OURS} hf"),
    "its difference": lambda case: difference(case, f"{OURS} hf"),
    "chooses as float32": lambda case: agreement(case, "transformers"),
    "minivllm does": lambda case: agreement(case, OURS),
    'with `rounding="hf"`': lambda case: agreement(case, f"{OURS} hf"),
}
CACHE_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "keys, transformers": lambda case: errors_of_layers(case, "transformers", "keys"),
    "keys, minivllm": lambda case: errors_of_layers(case, OURS, "keys"),
    "minivllm's is at most": lambda case: largest_ratio(case, "keys"),
    "values, transformers": lambda case: errors_of_layers(case, "transformers", "values"),
    "values, minivllm": lambda case: errors_of_layers(case, OURS, "values"),
    "at most": lambda case: largest_ratio(case, "values"),
}
BITS_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "compared": lambda case: case.kind or "",
    "how many": lambda case: f"{case.rows[OURS]['compared']:,}",
    "equal bits, transformers": lambda case: equal_bits(case, "transformers"),
    "minivllm": lambda case: equal_bits(case, OURS),
    "apart, transformers": lambda case: apart(case, "transformers"),
    "apart, minivllm": lambda case: apart(case, OURS),
}


# How a step was run, behind whose it is.
STATIC, EAGER, DECODER, COMPILE = "static", "eager", "decoder", "compile"
CACHE_FLOOR, LLAMA = "floor with cache", "llama.cpp"
PEER_STEPS = tuple(f"transformers {way}" for way in (STATIC, EAGER, DECODER, COMPILE))


STEP_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "batch": lambda case: str(case.tokens),
    "context": lambda case: f"{case.context:,}",
    "GPU": gpu,
    "Decoder": lambda case: bold(number(case.us(f"{OURS} {DECODER}"))),
    "tokens/s": lambda case: tokens_per_second(case, f"{OURS} {DECODER}"),
    "static cache, graph": lambda case: number(case.us(f"{OURS} {STATIC}")),
    "eager": lambda case: number(case.us(f"{OURS} {EAGER}")),
    "torch.compile": lambda case: number(case.us(f"{OURS} {COMPILE}")),
    "transformers: Decoder": lambda case: number(case.us(f"transformers {DECODER}")),
    "transformers: static cache, graph": lambda case: number(case.us(f"transformers {STATIC}")),
    "transformers: eager": lambda case: number(case.us(f"transformers {EAGER}")),
    "transformers: torch.compile": lambda case: number(case.us(f"transformers {COMPILE}")),
    "llama.cpp": lambda case: number(case.us(LLAMA)),
    "only reading the weights": lambda case: number(floor_us(case)),
    "Decoder / that": lambda case: ratio(case.us(f"{OURS} {DECODER}"), floor_us(case)),
    "reading weights and cache": lambda case: number(
        case.us(*(n for n in case.rows if n.startswith(f"{CACHE_FLOOR} x")))
    ),
    "host": lambda case: number(case.rows.get(f"{OURS} {DECODER}", {}).get("host_us")),
    "Decoder's memory": lambda case: mebibytes(case.rows.get(f"{OURS} {DECODER}", {}).get("memory_bytes")),
}

SHARDED_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "batch": lambda case: str(case.tokens),
    "GPUs": lambda case: f"{case.any('ranks')} x {gpu(case)}",
    "sharded": lambda case: bold(number(case.us(f"{OURS} sharded"))),
    "tokens/s": lambda case: tokens_per_second(case, f"{OURS} sharded"),
    "on one GPU": lambda case: number(case.us(f"{OURS} alone")),
    "speed-up": lambda case: ratio(case.us(f"{OURS} alone"), case.us(f"{OURS} sharded")),
    "the all-reduces alone": lambda case: number(case.us("sums alone")),
}


FIRST_TOKEN_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "batch": lambda case: str(case.any("batch")),
    "prompt": lambda case: f"{case.context:,}",
    "GPU": gpu,
    "Decoder": lambda case: bold(milliseconds(case, f"{OURS} {DECODER}")),
    "with `apply`, eager": lambda case: milliseconds(case, f"{OURS} {EAGER}"),
    "transformers: eager": lambda case: milliseconds(case, f"transformers {EAGER}"),
    "transformers: torch.compile": lambda case: milliseconds(case, f"transformers {COMPILE}"),
}
GENERATE_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "dtype": lambda case: case.dtype,
    "batch": lambda case: str(case.any("batch")),
    "prompt": lambda case: f"{case.context:,}",
    "GPU": gpu,
    "transformers": lambda case: tokens_per_second(case, "transformers"),
    "with `apply`": lambda case: tokens_per_second(case, OURS),
    "speed-up": lambda case: ratio(case.us("transformers"), ours_us(case)),
    "and `custom_generate`": lambda case: bold(tokens_per_second(case, f"{OURS} {DECODER}")),
    "its speed-up": lambda case: ratio(case.us("transformers"), case.us(f"{OURS} {DECODER}")),
}


def milliseconds(case: Case, variant: str) -> str:
    us = case.us(variant)
    return "" if us is None else number(us / 1e3)


def work(case: Case) -> str:
    """What one row of the summary did, in words."""
    many = f"{case.tokens:,} token{'s' if case.tokens > 1 else ''}"
    what = "a step of the whole model" if case.op == "step" else "RMSNorm and q, k, v"
    return f"{case.shape}, {what}, {many}"


def machine(case: Case) -> str:
    """The GPU, or the CPU with its number of cores."""
    environment = case.run["environment"]
    return gpu(case) or f"{environment['cpu']}, {environment['cpu_cores']} cores"


SUMMARY_COLUMNS: dict[str, Column] = {
    "bfloat16, microseconds": work,
    "on": machine,
    "minivllm": lambda case: bold(number(case.us(OURS, f"{OURS} {DECODER}"))),
    "torch": lambda case: number(case.us("torch", *PEER_STEPS)),
    "speed-up": lambda case: ratio(case.us("torch", *PEER_STEPS), case.us(OURS, f"{OURS} {DECODER}")),
    "torch without the norm": lambda case: number(case.us("gemm alone")),
    "only reading the weights": lambda case: number(floor_us(case)),
}


def mean_error(case: Case, variant: str) -> str:
    row = case.rows.get(variant, {})
    return f"{row['mean_error']:.3e} ± {row['error_deviation']:.1e}" if "mean_error" in row else ""


def difference(case: Case, variant: str) -> str:
    """Of a variant's error from that of transformers, with its standard error, as a share."""
    row, other = case.rows.get(variant, {}), case.rows.get("transformers", {})
    if not row.get("difference_error"):
        return ""
    share, spread = (100 * row[column] / other["mean_error"] for column in ("difference", "difference_error"))
    return f"{share:+.2f} ± {spread:.2f} %"


def difference_bound(case: Case, variant: str) -> str:
    """Below which the difference is with 95 % confidence, as a share too."""
    row, other = case.rows.get(variant, {}), case.rows.get("transformers", {})
    return f"{100 * row['difference_bound'] / other['mean_error']:+.2f} %" if "difference_bound" in row else ""


def errors_of_layers(case: Case, variant: str, name: str) -> str:
    """Of the caches' keys or values: the smallest and the largest over the layers."""
    errors = case.rows[variant][f"{name}_error"]
    return f"{min(errors):.2e} to {max(errors):.2e}"


def largest_ratio(case: Case, name: str) -> str:
    """Of minivllm's error of keys or values over that of transformers, the largest over the layers."""
    ours, theirs = (case.rows[variant][f"{name}_error"] for variant in (OURS, "transformers"))
    return f"{max(mine / other for mine, other in zip(ours, theirs, strict=True)):.3f}x"


def equal_bits(case: Case, variant: str) -> str:
    """All, or which share; never rounded up to all."""
    equal = case.rows.get(variant, {}).get("equal")
    return "" if equal is None else "all" if equal == 1 else f"{100 * equal:.1f} %"


def apart(case: Case, variant: str) -> str:
    return f"{case.rows[variant]['apart']:.1e}" if case.rows.get(variant, {}).get("apart") else ""


def agreement(case: Case, variant: str) -> str:
    row = case.rows.get(variant, {})
    return f"{100 * row['agreement']:.2f} %" if "agreement" in row else ""


def cases_table(columns: dict[str, Column], cases: list[Case]) -> str:
    return table(list(columns), [[column(case) for column in columns.values()] for case in cases])
