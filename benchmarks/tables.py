"""python -m benchmarks tables: writes Markdown tables from committed results into the pages that hold their markers.

A page says `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between is replaced by the table of that name. No
figure on those pages is typed by hand. NAMES at the end lists the tables.
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import COMPILE_MODES
from benchmarks.results import OURS, Case, Results, commit, place, runs
from minivllm.testing.shapes import MODELS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/*.md")
NOTHING = "No results are committed yet."
Column = Callable[[Case], str]
COMPILED = tuple(COMPILE_MODES)
DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
MODEL_NAMES = [shape.name for shape in MODELS]


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


def sources(cases: list[Case]) -> str:
    """Machine, date, commit and command of the runs that some cases come from."""
    lines = [f"{place(run)}, {run['date'][:10]}, commit {commit(run)}: `{run['command']}`.  " for run in runs(cases)]
    return "\n".join(lines)


def section(title: str, cases: list[Case], text: str) -> str:
    return f"{title}\n\n{text}\n\n{sources(cases)}\n" if cases else ""


def ours_us(case: Case) -> float | None:
    return case.us(OURS)


def floor_us(case: Case) -> float | None:
    return case.us("read_floor_pdl", "read_floor")


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
NOT_IN_README = ("batch invariant", "kernel")
README_COLUMNS = {head: column for head, column in QKV_COLUMNS.items() if head not in NOT_IN_README}
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


def by_model(case: Case) -> tuple:
    """The order of the projection's rows: model, dtype, tokens."""
    return MODEL_NAMES.index(case.shape), list(DTYPE_NAMES).index(case.dtype), case.tokens


def decode(results: Results, device: str, columns: dict[str, Column] = QKV_COLUMNS, dtypes=tuple(DTYPE_NAMES)) -> str:
    cases = [case for case in results.of(device, "rms_norm_qkv", tokens=1) if case.dtype in dtypes]
    cases.sort(key=by_model)
    return section("One token, microseconds:", cases, cases_table(columns, cases))


def prefill(results: Results, device: str, columns: dict[str, Column] = QKV_COLUMNS) -> str:
    cases = [case for case in results.of(device, "rms_norm_qkv") if case.tokens > 1]
    cases.sort(key=by_model)
    return section("More tokens, microseconds:", cases, cases_table(columns, cases))


NORM_MODES = {
    "walk": "each call on buffers of its own",
    "chain": "few tokens, each call reads what the one before it wrote",
}


def norms(results: Results, device: str, op: str, mode: str, **wanted) -> str:
    cases = results.of(device, op, mode=mode, **wanted)
    title = f"`{op}` on the {'GPU' if device == 'cuda' else 'CPU'}, {NORM_MODES[mode]}, microseconds:"
    return section(title, cases, cases_table(NORM_COLUMNS, cases))


def model_speed(results: Results, device: str) -> str:
    cases = results.of(device, "model")
    return section(
        "A whole model of transformers, as it is and with `apply`:", cases, cases_table(MODEL_COLUMNS, cases)
    )


def model_page(results: Results) -> str:
    parts = []
    for device in ("cuda", "cpu"):
        cases = results.of(device, "model", accuracy=True)
        text = cases_table(MODEL_ACCURACY_COLUMNS, cases)
        parts += [model_speed(results, device), section("Logits, against float32:", cases, text)]
    return "\n\n".join(part.strip() for part in parts if part)


def figures(results: Results) -> str:
    """The README's: what is drawn, then the numbers behind it for one token and for the norms."""
    images = [
        ("decode.png", "one token against the floor and the peers"),
        ("tokens.png", "more tokens against the torch pair"),
        ("rms_norm.png", "RMSNorm against a copy"),
        ("cpu.png", "the CPU against torch"),
    ]
    found = [f"![{text}](docs/img/{name})" for name, text in images if (ROOT / "docs/img" / name).exists()]
    on_gpu = [decode(results, "cuda", README_COLUMNS, ("bf16", "f32"))]
    on_gpu.append(norms(results, "cuda", "rms_norm", dtype="bf16", mode="walk"))
    on_gpu.append(model_speed(results, "cuda"))
    on_cpu = [decode(results, "cpu", README_COLUMNS), prefill(results, "cpu", README_COLUMNS)]
    if any(on_gpu):
        found += ["### On the GPU", *on_gpu]
    if any(on_cpu):
        found += ["### On the CPU", *on_cpu]
    return "\n\n".join(part.strip() for part in found if part)


def norm_page(results: Results) -> str:
    parts = [
        norms(results, device, op, mode=mode)
        for device in ("cuda", "cpu")
        for op in ("rms_norm", "add_rms_norm")
        for mode in ("walk", "chain")
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def qkv_page(results: Results) -> str:
    parts = [part(results, device) for device in ("cuda", "cpu") for part in (decode, prefill)]
    return "\n\n".join(part.strip() for part in parts if part)


def numerics(results: Results) -> str:
    """Op x dtype x backend: the worst of each figure over shapes and one-token or many-token calls, normal data; and
    the largest RMS error relative to torch's over all kinds of data."""
    head = ["op", "dtype", "backend", "rounding", "max error", "RMS error", "torch's RMS error"]
    head += ["RMS / torch's, worst of all data", "correctly rounded", "torch's"]
    lines, used = [], []
    for device in ("cpu", "cuda"):
        for op in ("rms_norm", "add_rms_norm", "rms_norm_qkv"):
            for dtype in ("f32", "f16", "bf16"):
                cases = results.of(device, op, accuracy=True, dtype=dtype)
                used += cases
                for rounding, peer in (("hf", "torch hf"), ("fp32", "torch")):
                    line = numerics_line(cases, f"{OURS} {rounding}", peer)
                    if line:
                        lines.append([op, DTYPE_NAMES[dtype], device, rounding, *line])
    return section("Against float64, over 256 tokens:", used, table(head, lines)).strip()


def numerics_line(cases: list[Case], name: str, peer: str) -> list[str] | None:
    pairs = [
        (case.kind, row, case.rows[peer])
        for case in cases
        for variant, row in case.rows.items()
        if variant in (name, f"{name}, one token") and "rms_error" in row and "rms_error" in case.rows.get(peer, {})
    ]
    normal = [(row, peer_row) for kind, row, peer_row in pairs if kind == "normal"]
    if not normal:
        return None
    worst = max(normal, key=lambda pair: pair[0]["rms_error"])
    return [
        f"{max(row['max_error'] for row, _ in normal):.2e}",
        f"{worst[0]['rms_error']:.3e}",
        f"{worst[1]['rms_error']:.3e}",
        f"{max(row['rms_error'] / max(peer_row['rms_error'], 1e-300) for _, row, peer_row in pairs):.3f}",
        f"{100 * min(row['correctly_rounded'] for row, _ in normal):.2f} %",
        f"{100 * min(peer_row['correctly_rounded'] for _, peer_row in normal):.2f} %",
    ]


HOST_MODES = {"host": "gradients recorded", "host, no_grad": "no_grad"}


def host(results: Results) -> str:
    parts = []
    for device in ("cuda", "cpu"):
        cases = results.of(device, "host")
        names = list(dict.fromkeys(name for case in cases for name in case.rows))
        head = ["host time of a call, us", *(f"{case.dtype}, {HOST_MODES[case.mode]}" for case in cases)]
        rows = [[name, *(number(case.us(name)) for case in cases)] for name in names]
        parts.append(
            section(f"On the {'GPU' if device == 'cuda' else 'CPU'}:", cases, table(head, rows) if rows else "")
        )
        counted = [case for case in cases if any("read_us" in row for row in case.rows.values())]
        parts += [host_steps(case) for case in counted[:1]]
    return "\n\n".join(part.strip() for part in parts if part)


def host_steps(case: Case) -> str:
    """Where the time of our own calls goes, in one case."""
    columns = ("net_us", "read_us", "plan_us", "allocate_us", "run_us", "return_us")
    rows = [
        [name, *(number(row.get(column)) for column in columns)] for name, row in case.rows.items() if "read_us" in row
    ]
    head = [
        f"{case.dtype}, {HOST_MODES[case.mode]}: us",
        *(column.removesuffix("_us") for column in columns),
    ]
    return table(head, rows)


NAMES = {
    "figures": figures,
    "table: rms_norm": norm_page,
    "table: rms_norm_qkv": qkv_page,
    "table: numerics": numerics,
    "table: host": host,
    "table: model": model_page,
}


def filled(text: str, results: Results) -> str:
    """A page with every marked part replaced; KeyError for a marker that no table has."""

    def replace(match: re.Match) -> str:
        name = match.group(1)
        return f"<!-- begin {name} -->\n{NAMES[name](results) or NOTHING}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (.+?) -->\n.*?<!-- end \1 -->", replace, text, flags=re.DOTALL)


def update(directory: Path) -> int:
    """Writes the pages, and names those that changed."""
    results = Results(directory)
    for page in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        old = page.read_text()
        new = filled(old, results)
        if new != old:
            page.write_text(new)
            print(f"updated {page.relative_to(ROOT)}")
    return 0
