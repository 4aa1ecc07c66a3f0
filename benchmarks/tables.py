"""python -m benchmarks tables: writes Markdown tables from committed results into the pages that hold their markers.

A page says `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between is replaced by the table of that name. No
figure on those pages is typed by hand. NAMES at the end lists the tables.
"""

import re
from pathlib import Path

from benchmarks import regret_tables
from benchmarks.columns import (
    ATTENTION_COLUMNS,
    BITS_COLUMNS,
    CACHE_COLUMNS,
    DTYPE_NAMES,
    FIRST_TOKEN_COLUMNS,
    GENERATE_COLUMNS,
    LINEAR_COLUMNS,
    MODEL_ACCURACY_COLUMNS,
    MODEL_COLUMNS,
    NORM_COLUMNS,
    OVERVIEW_COLUMNS,
    QKV_COLUMNS,
    SHARDED_COLUMNS,
    STEP_COLUMNS,
    SUMMARY_COLUMNS,
    Column,
    cases_table,
    number,
    table,
)
from benchmarks.results import OURS, Case, Results, commit, place, runs
from minivllm.testing.shapes import MODELS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/*.md")
NOTHING = "No results are committed yet."
MODEL_NAMES = [shape.name for shape in MODELS]


def sources(cases: list[Case]) -> str:
    """Machine, date, commit and command of the runs that some cases come from."""
    lines = [f"{place(run)}, {run['date'][:10]}, commit {commit(run)}: `{run['command']}`.  " for run in runs(cases)]
    return "\n".join(lines)


def section(title: str, cases: list[Case], text: str) -> str:
    return f"{title}\n\n{text}\n\n{sources(cases)}\n" if cases else ""


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


def linears(results: Results) -> str:
    parts = []
    for op in ("linear", "linear_add", "rms_norm_linear", "rms_norm_gate_up"):
        cases = results.of("cuda", op)
        parts.append(section(f"`{op}` on the GPU, microseconds:", cases, cases_table(LINEAR_COLUMNS, cases)))
    return "\n\n".join(part.strip() for part in parts if part)


def attention(results: Results) -> str:
    cases = sorted(results.of("cuda", "decode_attention"), key=lambda case: case.shape)
    return section("`decode_attention` on the GPU, microseconds:", cases, cases_table(ATTENTION_COLUMNS, cases)).strip()


def by_size(case: Case) -> tuple:
    """The order of the rows of whole models: model, dtype, context, batch."""
    return case.any("flops") / case.tokens, list(DTYPE_NAMES).index(case.dtype), case.context, case.tokens


def steps(results: Results, device: str) -> str:
    cases = sorted(results.of(device, "step"), key=by_size)
    title = f"A decode step on the {'GPU' if device == 'cuda' else 'CPU'}, microseconds:"
    return section(title, cases, cases_table(STEP_COLUMNS, cases)).strip()


def step_page(results: Results) -> str:
    """Steps, then the time to the first token, then model.generate."""
    parts = [steps(results, device) for device in ("cuda", "cpu")]
    for op, title, columns in (
        ("first_token", "From a prompt to its first token, milliseconds:", FIRST_TOKEN_COLUMNS),
        ("generate", "`model.generate`, new tokens a second, the time for the prompt in it:", GENERATE_COLUMNS),
    ):
        for device in ("cuda", "cpu"):
            cases = sorted(results.of(device, op), key=by_size)
            parts.append(section(title, cases, cases_table(columns, cases)).strip())
    return "\n\n".join(part for part in parts if part)


def sharded_steps(results: Results) -> str:
    cases = sorted(results.of("cuda", "sharded_step"), key=lambda case: (case.any("bytes"), case.tokens))
    title = f"A decode step with {cases[0].context} tokens in the cache, bfloat16, microseconds:" if cases else ""
    return section(title, cases, cases_table(SHARDED_COLUMNS, cases))


def model_page(results: Results) -> str:
    parts = []
    for device in ("cuda", "cpu"):
        cases = results.of(device, "model", accuracy=True)
        text = cases_table(MODEL_ACCURACY_COLUMNS, cases)
        parts += [model_speed(results, device), section("Logits, against float32:", cases, text)]
    return "\n\n".join(part.strip() for part in parts if part)


def model_accuracy(results: Results) -> str:
    """Logits and rollouts, then keys and values, then bits, of every model on the GPU or else on the CPU."""
    cases = results.of("cuda", "model_accuracy", accuracy=True) or results.of("cpu", "model_accuracy", accuracy=True)
    parts = (
        ("Logits, against float32:", MODEL_ACCURACY_COLUMNS, "agreement"),
        ("Keys and values, against float32, from the best layer to the worst:", CACHE_COLUMNS, "keys_error"),
        ("The same bits:", BITS_COLUMNS, "equal"),
    )
    texts = []
    for title, columns, column in parts:
        own = [case for case in cases if column in case.rows[OURS]]
        texts += [f"{title}\n\n{cases_table(columns, own)}"] if own else []
    return "\n\n".join([*texts, sources(cases)]).strip()


# The README's rows: device, op, and which of its cases.
SUMMARY = (
    ("cuda", "rms_norm_qkv", {"shape": "qwen3-0.6b", "tokens": 1}),
    ("cuda", "rms_norm_qkv", {"shape": "qwen3-8b", "tokens": 1}),
    ("cuda", "rms_norm_qkv", {"shape": "llama-70b", "tokens": 1}),
    ("cuda", "rms_norm_qkv", {"shape": "qwen3-8b", "tokens": 512}),
    ("cpu", "rms_norm_qkv", {"shape": "qwen3-8b", "tokens": 1}),
    ("cuda", "step", {"shape": "qwen3-0.6b", "tokens": 1, "context": 512}),
    ("cpu", "step", {"shape": "qwen3-0.6b", "tokens": 1, "context": 512}),
)


def summary(results: Results) -> str:
    """The README's: one picture, a few rows, and the machines. Every case and its command is in docs/figures.md."""
    cases = [case for device, op, wanted in SUMMARY for case in results.of(device, op, dtype="bf16", **wanted)]
    machines = dict.fromkeys(place(case.run) for case in cases)
    return f"{picture('docs/img', 'decode.png')}\n\n{cases_table(SUMMARY_COLUMNS, cases)}\n\n{'; '.join(machines)}."


PICTURES = {
    "decode.png": "one token against the floor and the peers",
    "tokens.png": "more tokens against the torch pair",
    "rms_norm.png": "RMSNorm against a copy",
    "cpu.png": "the CPU against torch",
}


def picture(folder: str, name: str) -> str:
    return f"![{PICTURES[name]}]({folder}/{name})"


def figures(results: Results) -> str:
    """docs/figures.md: what is drawn, then the numbers behind it for one token, for the norms and for whole models."""
    on_gpu = [
        picture("img", "decode.png"),
        decode(results, "cuda", OVERVIEW_COLUMNS, ("bf16", "f32")),
        picture("img", "tokens.png"),
        picture("img", "rms_norm.png"),
        norms(results, "cuda", "rms_norm", dtype="bf16", mode="walk"),
        steps(results, "cuda"),
        model_speed(results, "cuda"),
        regret(results, "cuda"),
    ]
    on_cpu = [
        picture("img", "cpu.png"),
        decode(results, "cpu", OVERVIEW_COLUMNS),
        prefill(results, "cpu", OVERVIEW_COLUMNS),
        steps(results, "cpu"),
        regret(results, "cpu"),
    ]
    parts = ["## On the GPU", *on_gpu, "## On the CPU", *on_cpu]
    return "\n\n".join(part.strip() for part in parts if part)


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


def regret(results: Results, device: str, tables=regret_tables.by_dtype) -> str:
    cases = results.of(device, "regret")
    title = f"The choice of kernels on the {'GPU' if device == 'cuda' else 'CPU'}: time over that of the best kernel:"
    return section(title, regret_tables.measured(cases), tables(cases))


def regret_page(results: Results) -> str:
    parts = [regret(results, device, regret_tables.page) for device in ("cuda", "cpu")]
    return "\n\n".join(part.strip() for part in parts if part)


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
    "summary": summary,
    "figures": figures,
    "table: rms_norm": norm_page,
    "table: rms_norm_qkv": qkv_page,
    "table: numerics": numerics,
    "table: host": host,
    "table: model": model_page,
    "table: model_accuracy": model_accuracy,
    "table: linear": linears,
    "table: decode_attention": attention,
    "table: step": step_page,
    "table: sharded_step": sharded_steps,
    "table: regret": regret_page,
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
