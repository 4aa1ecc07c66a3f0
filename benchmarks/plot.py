"""python -m benchmarks plot: draws pictures from committed results; with --output docs/img those of the docs."""

import math
from pathlib import Path

from benchmarks.columns import COMPILED, DTYPE_NAMES
from benchmarks.results import OURS, Case, Results, commit, place, runs
from benchmarks.tables import ROOT

IMAGES = ROOT / "build" / "img"
INK, FAINT = "#1a1a1a", "#d9d9d9"
# Hues that the colour-blind tell apart, too (Okabe and Ito).
COLORS = {
    "minivllm": "#d55e00",
    "torch pair": "#0072b2",
    "torch": "#0072b2",
    "torch.compile": "#56b4e9",
    "GEMM alone": "#009e73",
    "Triton, one output per program": "#cc79a7",
    "NumPy": "#e0b000",
    "copy": "#404040",
    "naive": "#b3b3b3",
}
MODEL_STYLES = (
    ("#e69f00", "o"),
    ("#d55e00", "s"),
    ("#cc79a7", "^"),
    ("#0072b2", "D"),
    ("#009e73", "v"),
    ("#1a1a1a", "P"),
)


def figure(columns: int = 1, height: float = 4.2, same_scale: bool = False):
    """A figure and its axes: white, dark text, no box, a faint grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    plt.rcParams.update(style | {"font.size": 10, "axes.titlesize": 11, "figure.facecolor": "white"})
    drawing, axes = plt.subplots(
        1, columns, figsize=(10, height), squeeze=False, sharey=same_scale, layout="constrained"
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
    return drawing, axes[0]


def origin(cases: list[Case]) -> str:
    """A line for each machine and day, with its versions and the commits of the runs that the cases come from."""
    commits: dict[str, dict[str, None]] = {}
    for run in runs(cases):
        commits.setdefault(f"{place(run)}, {run['date'][:10]}", {})[commit(run)] = None
    return "\n".join(f"{where}, commit {', '.join(found)}" for where, found in commits.items())


def save(drawing, name: str, cases: list[Case]) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    drawing.text(0.995, -0.01, origin(cases), ha="right", va="top", fontsize=7, color="#595959")
    drawing.savefig(IMAGES / name, dpi=150, bbox_inches="tight", pad_inches=0.15)
    print(f"drew {IMAGES / name}")


def bars(axis, cases: list[Case], labels: list[str], series: dict, value, text) -> None:
    """Groups of bars, one per case. series: legend name -> variants, the fastest of which counts; text(us): a label."""
    shown = {name: variants for name, variants in series.items() if any(case.us(*variants) for case in cases)}
    width = 0.86 / len(shown)
    for number, (name, variants) in enumerate(shown.items()):
        timed = [(group, case, case.us(*variants)) for group, case in enumerate(cases) if case.us(*variants)]
        at = [group + (number - (len(shown) - 1) / 2) * width for group, _, _ in timed]
        drawn = axis.bar(at, [value(case, us) for _, case, us in timed], width * 0.92, color=COLORS[name], label=name)
        axis.bar_label(drawn, [text(us) for _, _, us in timed], fontsize=6.5, padding=2, rotation=90)
    axis.set_xticks(range(len(cases)), labels)


def dashed(axis, at: float, meaning: str) -> None:
    """A line across, which the legend names."""
    axis.axhline(at, color=INK, linewidth=1, linestyle="--", label=meaning)


def legend(drawing, axes) -> None:
    """One row above everything, of what any of the axes shows."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    drawing.legend(
        entries.values(), entries.keys(), loc="outside upper left", ncols=len(entries), frameon=False, fontsize=9
    )


def shape_label(case: Case) -> str:
    return f"{case.shape}\n{case.any('hidden')} → {case.any('outputs')}"


def short(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


PEERS = {
    "minivllm": (OURS,),
    "torch pair": ("torch",),
    "torch.compile": COMPILED,
    "GEMM alone": ("gemm alone",),
    "Triton, one output per program": ("triton per output",),
    "NumPy": ("numpy",),
}


def decode(results: Results) -> None:
    """One token: time over the time of only reading the weights."""
    cases = [
        case
        for case in results.of("cuda", "rms_norm_qkv", tokens=1, dtype="bf16")
        if case.us("read_floor_pdl") and case.us(OURS)
    ]
    if not cases:
        return
    drawing, (axis,) = figure()
    bars(
        axis,
        cases,
        [shape_label(case) for case in cases],
        PEERS,
        lambda case, us: us / case.us("read_floor_pdl"),
        short,
    )
    dashed(axis, 1, "read floor")
    axis.set_ylabel("time / read floor")
    axis.margins(y=0.12)
    axis.set_title(
        "RMSNorm + QKV, one token, bfloat16. Bars: time / read floor; numbers: microseconds; lower is better",
        loc="left",
    )
    legend(drawing, [axis])
    save(drawing, "decode.png", cases)


def by_tokens(axis, cases: list[Case], title: str, label: str, value) -> None:
    """A line per shape of value(case) over the number of tokens: of two close counts only the larger, and labels at
    powers of two."""
    counts = sorted({case.tokens for case in cases})
    counts = [count for count, after in zip(counts, [*counts[1:], math.inf], strict=True) if after > 1.1 * count]
    for number, shape in enumerate(dict.fromkeys(case.shape for case in cases)):
        points = [case for case in cases if case.shape == shape and case.tokens in counts]
        points.sort(key=lambda case: case.tokens)
        color, marker = MODEL_STYLES[number % len(MODEL_STYLES)]
        at, values = [case.tokens for case in points], [value(case) for case in points]
        axis.plot(at, values, label=shape, color=color, marker=marker, markersize=4, linewidth=1.4)
    marked = [count for count in counts if count.bit_count() == 1]
    axis.set_xscale("log", base=2)
    axis.set_xticks(marked, [str(count) for count in marked], rotation=60, fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens")
    axis.set_ylabel(label)
    axis.set_title(title, loc="left")


def timed(results: Results, *variants: str) -> list[Case]:
    """The projection's cases in bfloat16 on the GPU that have our time and those of all variants."""
    cases = results.of("cuda", "rms_norm_qkv", dtype="bf16")
    return [case for case in cases if all(case.us(variant) for variant in (OURS, *variants))]


def tokens(results: Results) -> None:
    """Speed relative to the torch pair and to its GEMM, by the number of tokens."""
    cases = timed(results, "torch", "gemm alone")
    if not cases:
        return
    drawing, axes = figure(2)
    for axis, peer, name in ((axes[0], "torch", "torch pair"), (axes[1], "gemm alone", "GEMM alone")):
        title, label = f"bfloat16, against the {name}: higher is better", f"time of the {name} / time of minivllm"
        by_tokens(axis, cases, title, label, lambda case, peer=peer: case.us(peer) / case.us(OURS))
        dashed(axis, 1, "as fast as the peer")
    legend(drawing, axes[:1])
    save(drawing, "tokens.png", cases)


def beside_gemm(cases: list[Case], label: str, value, top: float, name: str, floor: float | None = None) -> None:
    """By tokens, value(case, variant): of ours, and beside it of torch's GEMM without the norm."""
    drawing, axes = figure(2)
    titles = {OURS: "bfloat16, minivllm, norm included", "gemm alone": "bfloat16, torch's GEMM alone"}
    for axis, (variant, title) in zip(axes, titles.items(), strict=True):
        by_tokens(axis, cases, title, label, lambda case, variant=variant: value(case, variant))
        if floor is not None:
            dashed(axis, floor, "read floor")
        axis.set_ylim(0, top)
    legend(drawing, axes[:1])
    save(drawing, name, cases)


def floors(results: Results) -> None:
    """Few tokens: time over that of only reading the weights."""
    if cases := timed(results, "gemm alone", "read_floor_pdl"):
        label = "time / read floor: lower is better"
        beside_gemm(cases, label, lambda case, of: case.us(of) / case.us("read_floor_pdl"), 6, "floors.png", floor=1)


def rates(results: Results) -> None:
    """TFLOP/s of many tokens."""
    if cases := [case for case in timed(results, "gemm alone") if case.tokens > 64]:
        label = "TFLOP/s: higher is better"
        beside_gemm(cases, label, lambda case, of: case.any("flops") / case.us(of) / 1e6, 850, "rates.png")


def norms(results: Results) -> None:
    """Rate of the norms, read and written once, beside a copy."""
    pick = {"dtype": "bf16", "mode": "walk"}
    plain, added = (results.of("cuda", op, **pick) for op in ("rms_norm", "add_rms_norm"))
    if not plain:
        return
    drawing, axes = figure(2 if added else 1)
    for axis, cases in zip(axes, (plain, added), strict=False):
        naive = tuple(dict.fromkeys(name for case in cases for name in case.rows if "naive" in name))
        series = {
            "copy": ("torch copy", "16-byte copy"),
            "minivllm": (OURS,),
            "torch.compile": COMPILED,
            "torch": ("torch",),
            "naive": naive,
        }
        labels = [case.shape.replace("x", "\n× ") for case in cases]
        bars(axis, cases, labels, series, lambda case, us: case.any("bytes") / us / 1e6, lambda us: "")
        axis.set_title(f"{cases[0].op}, bfloat16: higher is better", loc="left")
        axis.set_ylabel("TB/s read and written")
        axis.tick_params(axis="x", labelsize=8)
    legend(drawing, axes)
    save(drawing, "rms_norm.png", plain + added)


def cpu(results: Results) -> None:
    """Speed on the CPU relative to torch's pair."""
    cases = [case for case in results.of("cpu", "rms_norm_qkv") if case.us(OURS) and case.us("torch")]
    groups = [(dtype, count) for dtype in ("bf16", "f32") for count in (1, 128)]
    groups = [group for group in groups if any((case.dtype, case.tokens) == group for case in cases)]
    if not groups:
        return
    drawing, axes = figure(len(groups), height=3.6, same_scale=True)
    for axis, (dtype, count) in zip(axes, groups, strict=True):
        chosen = [case for case in cases if (case.dtype, case.tokens) == (dtype, count)]
        series = {name: PEERS[name] for name in ("minivllm", "torch.compile", "NumPy")}
        bars(
            axis, chosen, [case.shape for case in chosen], series, lambda case, us: case.us("torch") / us, lambda us: ""
        )
        dashed(axis, 1, "torch pair")
        axis.tick_params(axis="x", labelrotation=60, labelsize=8)
        axis.set_title(f"{DTYPE_NAMES[dtype]}, {count} token{'s' if count > 1 else ''}", loc="left")
    axes[0].set_ylabel("time of the torch pair / time:\nhigher is better")
    legend(drawing, axes)
    save(drawing, "cpu.png", cases)


def draw(directory: Path, images: Path | None = None) -> int:
    """Draws what there are results for."""
    global IMAGES
    IMAGES = images or IMAGES
    results = Results(directory)
    for drawn in (decode, floors, tokens, rates, norms, cpu):
        drawn(results)
    return 0
