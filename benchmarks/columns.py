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
    grown = case.rows.get(variant, {}).get("peak_bytes")
    return "" if grown is None else f"{grown / 2**20:.1f} MiB"


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
    "keys": lambda case: f"{case.any('context'):,}",
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
    'error with `rounding="hf"`': lambda case: mean_error(case, f"{OURS} hf"),
    "its difference": lambda case: difference(case, f"{OURS} hf"),
    "chooses as float32": lambda case: agreement(case, "transformers"),
    "minivllm does": lambda case: agreement(case, OURS),
    'with `rounding="hf"`': lambda case: agreement(case, f"{OURS} hf"),
}


STATIC, DECODER, COMPILE = "static", "decoder", "compile"  # how a step was run, behind whose it is
PEER_STEPS = tuple(f"transformers {way}" for way in (STATIC, DECODER, COMPILE))


STEP_COLUMNS: dict[str, Column] = {
    "model": lambda case: case.shape,
    "batch": lambda case: str(case.tokens),
    "GPU": gpu,
    "Decoder": lambda case: bold(number(case.us(f"{OURS} {DECODER}"))),
    "tokens/s": lambda case: tokens_per_second(case, f"{OURS} {DECODER}"),
    "static cache, graph": lambda case: number(case.us(f"{OURS} {STATIC}")),
    "torch.compile": lambda case: number(case.us(f"{OURS} {COMPILE}")),
    "transformers: static cache, graph": lambda case: number(case.us(f"transformers {STATIC}")),
    "transformers: torch.compile": lambda case: number(case.us(f"transformers {COMPILE}")),
    "only reading the weights": lambda case: number(floor_us(case)),
    "Decoder / that": lambda case: ratio(case.us(f"{OURS} {DECODER}"), floor_us(case)),
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
    if not row.get("difference_error") or "mean_error" not in other:
        return ""
    share, spread = (100 * row[column] / other["mean_error"] for column in ("difference", "difference_error"))
    return f"{share:+.2f} ± {spread:.2f} %"


def agreement(case: Case, variant: str) -> str:
    row = case.rows.get(variant, {})
    return f"{100 * row['agreement']:.2f} %" if "agreement" in row else ""


def cases_table(columns: dict[str, Column], cases: list[Case]) -> str:
    return table(list(columns), [[column(case) for column in columns.values()] for case in cases])
