"""The doctor's report as text."""

from collections.abc import Callable


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Lines of a table; columns maps a title to a format of the row."""
    cells = [list(columns)] + [[text.format(**row) for text in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return [f"  {line.rstrip()}" for line in padded]


def render(report: dict, problems: list[str]) -> str:
    lines = []

    def section(name: str, title: str, body: Callable[[object], list[str]]) -> None:
        if name not in report:
            return
        value = report[name]
        broken = isinstance(value, dict) and set(value) == {"error"}
        lines.extend(["", title, *([f"  {value['error']}"] if broken else body(value))])

    section("host", "host", lambda h: [f"  {key:12} {value}" for key, value in h.items()])
    section("extension", "extension", lambda e: [f"  {e['version']}  {e['path']}"])
    section("cpu", "CPU backend", render_cpu)
    section("driver", "NVIDIA driver", lambda d: [f"  CUDA {d['cuda']}  {d['kernel_module']}"])
    section("cuda", "CUDA backend", render_cuda)
    section("frameworks", "frameworks", render_frameworks)
    section("kernels", "kernels", render_kernels)
    section("self_check", "self-check against float64", render_checks)
    section(
        "benchmark",
        "benchmark (from Python, warm)",
        lambda rows: table(
            rows,
            {"op": "{op}", "device": "{device}", "tokens": "{tokens}", "us/call": "{us:.1f}", "GB/s": "{gb_per_s:.1f}"},
        ),
    )
    verdict = [f"  {problem}" for problem in problems] if problems else ["  none"]
    return "\n".join(["minivllm, as seen by its doctor", *lines, "", "problems", *verdict])


def render_cpu(cpu: dict) -> list[str]:
    return [f"  usable, {cpu['threads']} threads, {' '.join(cpu['features']) or 'portable C'}"]


def render_cuda(cuda: dict) -> list[str]:
    built = f"built for {' '.join(cuda['archs'])}" if cuda["built"] else "not built"
    gpus = [
        f"  cuda:{index}  {gpu['name']}, compute capability {gpu['compute_capability'] / 10:.1f}, "
        f"{gpu['sm_count']} SMs, {gpu['total_memory_bytes'] / 2**30:.0f} GiB{'' if gpu['usable'] else ', NOT usable'}"
        for index, gpu in enumerate(cuda["gpus"])
    ]
    return [f"  {built}", *([f"  not usable: {cuda['why_not']}"] if cuda["why_not"] else []), *gpus]


def render_frameworks(frameworks: dict) -> list[str]:
    lines = [f"  {name:10} {found['version']:16} {found['error'] or ''}".rstrip() for name, found in frameworks.items()]
    return lines or ["  none"]


def render_kernels(rows: list[dict]) -> list[str]:
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        usable = [row["name"] for row in of_op if row["usable"]]
        lines.append(f"  {op}: {len(usable)} of {len(of_op)} usable")
        for reason in dict.fromkeys(row["why_not"] for row in of_op if not row["usable"]):
            names = [row["name"] for row in of_op if not row["usable"] and row["why_not"] == reason]
            lines.append(f"    {len(names)} not ({reason})")
    return lines


def render_checks(rows: list[dict]) -> list[str]:
    done = [row | {"verdict": "ok" if row["ok"] else "WRONG"} for row in rows if "ok" in row]
    lines = table(
        done,
        {
            "op": "{op}",
            "dtype": "{dtype}",
            "device": "{device}",
            "kernel": "{kernel}",
            "max ulp": "{max_ulp:.2f}",
            "max error": "{max_error:.1e}",
            "": "{verdict}",
        },
    )
    skipped = [row for row in rows if "skipped" in row]
    return lines + [f"  skipped {row['dtype']} on {row['device']}: {row['skipped']}" for row in skipped]
