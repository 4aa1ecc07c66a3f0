"""python -m benchmarks OP: the command line of the benchmarks."""

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path

from benchmarks.peers import COMPILE_MODES

LINEAR = ("linear", "linear_add", "rms_norm_linear", "rms_norm_gate_up")
ACTIVATIONS = ("silu_and_mul", "gelu_and_mul")
OPS = ("rms_norm", "add_rms_norm", "rms_norm_qkv", *LINEAR, "decode_attention", *ACTIVATIONS, "host", "accuracy")
ALL_DTYPES = ("bf16", "f16", "f32")
WHOLE = ("model", "model_accuracy", "step", "first_token", "generate")  # of models of transformers
RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m benchmarks", description="minivllm beside its peers, in one run."
    )
    commands.add_argument("op", choices=(*OPS, *WHOLE, "regret", "all", "plot", "tables"))
    commands.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch has one")
    commands.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help="model names; of norms and activations TOKENSxHIDDEN; of decode_attention HEADSxKVHEADS",
    )
    commands.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[],
        metavar="M",
        help="token counts; of decode_attention and whole models: batches",
    )
    commands.add_argument("--dtype", nargs="+", choices=ALL_DTYPES, help="default: those of the op's targets")
    commands.add_argument(
        "--kernel", nargs="+", metavar="ROW", help="rows to force as well, or all; default: all on CUDA"
    )
    commands.add_argument(
        "--compile",
        nargs="*",
        choices=tuple(COMPILE_MODES.values()),
        metavar="MODE",
        help=f"torch.compile too, in these modes or in all: {', '.join(COMPILE_MODES.values())} (slow: name the "
        "shapes; for chains of a norm, the --tokens)",
    )
    commands.add_argument("--layers", type=int, metavar="N", help="of whole models: only so many layers")
    commands.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="of step and regret: tokens in the cache; of first_token and generate: in the prompt",
    )
    commands.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="of step: what all caches of a case may take together; default: 0.8 of the free memory of a GPU",
    )
    commands.add_argument(
        "--modes", nargs="+", choices=("eager", "graph", "compile"), help="of model; default: eager graph"
    )
    commands.add_argument(
        "--surroundings",
        action="store_true",
        help="rms_norm_qkv on CUDA: also warm and transposed weights, a neighbour of torch's, a second stream",
    )
    commands.add_argument("--tf32", action="store_true", help="rms_norm_qkv of f32 on CUDA: also where TF32 is allowed")
    regret = commands.add_argument_group("of regret")
    regret.add_argument("--ops", nargs="+", default=[], metavar="OP", help="these ops only; default: all with kernels")
    regret.add_argument("--seconds", type=float, metavar="N", help="start no point later; default: the whole grid")
    regret.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the points")
    regret.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: minivllm's own")
    regret.add_argument(
        "--isa",
        nargs="+",
        default=[],
        metavar="ISA",
        help="rows of the CPU of these instruction sets only, such as avx2; the chosen row is their cheapest",
    )
    commands.add_argument("--quick", action="store_true", help="fewer cases, shorter samples")
    commands.add_argument("--json", metavar="FILE", help="where the rows go")
    commands.add_argument("--json-dir", metavar="DIR", help="with all: DIR/<device>_<op>.json")
    commands.add_argument("--commit", metavar="SHA", help="the commit measured, where .git does not say")
    commands.add_argument(
        "--onednn-isa", metavar="ISA", help="ONEDNN_MAX_CPU_ISA for torch on the CPU; ALL lifts the limit"
    )
    commands.add_argument(
        "--results", default=str(RESULTS), metavar="DIR", help="with plot and tables: the JSON files to read"
    )
    commands.add_argument("--output", metavar="DIR", help="with plot: where the pictures go (build/img)")
    return commands


def shape_error(op: str, shapes: list[str]) -> str | None:
    """What is wrong with the --shapes of an op."""
    if op in ("rms_norm", "add_rms_norm", *ACTIVATIONS):
        wrong = [shape for shape in shapes if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", shape)]
        return f"--shapes of {op} are TOKENSxHIDDEN, such as 4096x1024, not {wrong[0]}" if wrong else None
    if op == "decode_attention":
        wrong = [shape for shape in shapes if not are_heads(shape)]
        return f"--shapes of {op} are HEADSxKVHEADS, such as 16x8, not {wrong[0]}" if wrong else None
    from minivllm.testing import models, points
    from minivllm.testing.shapes import GATE_UPS, HEADS, MODELS, PROJECTIONS

    of_op = {"rms_norm_linear": HEADS, "linear": PROJECTIONS, "linear_add": PROJECTIONS, "rms_norm_gate_up": GATE_UPS}
    names = list(models.MODELS) if op in WHOLE else [shape.name for shape in of_op.get(op, MODELS)]
    if op == "regret":
        names = list(dict.fromkeys(shape.name for each in points.OPS.values() for shape in each.shapes))
    wrong = [shape for shape in shapes if shape not in names]
    return f"no shape {wrong[0]} for {op}; there are {', '.join(names)}" if wrong else None


def regret_error(args: argparse.Namespace) -> str | None:
    """What is wrong with the options that only regret has."""
    if args.op != "regret":
        given = [name for name in ("ops", "seconds", "threads", "isa") if getattr(args, name)]
        return f"--{given[0]} is an option of regret, not of {args.op}" if given else None
    from minivllm.testing import points

    if wrong := [op for op in args.ops if op not in points.OPS]:
        return f"--ops: there is no op {wrong[0]}; there are {', '.join(points.OPS)}"
    return isa_error(args) if args.isa else None


def isa_error(args: argparse.Namespace) -> str | None:
    """What is wrong with --isa."""
    from minivllm import kernels

    if args.device != "cpu":
        return "--isa limits the rows of the CPU: name --device cpu"
    usable = list(dict.fromkeys(row.isa for row in kernels() if row.usable and not row.isa.startswith("sm")))
    if wrong := [isa for isa in args.isa if isa not in usable]:
        return f"--isa: no kernel of {wrong[0]} runs here; there are {', '.join(usable)}"
    return None


def are_heads(shape: str) -> bool:
    """Whether it names head counts of which the second divides the first."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", shape):
        return False
    heads, kv_heads = map(int, shape.split("x"))
    return heads % kv_heads == 0


def hold_onednn(isa: str | None) -> None:
    """Starts this process again with oneDNN held to an instruction set: it reads the variable once, at its first use.

    The default holds torch to what minivllm's own CPU kernels use where the CPU has AMX, and changes nothing elsewhere.
    """
    from benchmarks.environment import cpu_field

    if isa is None and "amx_tile" in cpu_field("flags"):
        isa = "AVX512_CORE_BF16"
    if isa is not None and os.environ.get("ONEDNN_MAX_CPU_ISA") != isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = isa
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])


def dtypes(op: str, args: argparse.Namespace) -> tuple[str, ...]:
    if args.dtype:
        return tuple(args.dtype)
    if op in ("accuracy", "regret"):
        return ALL_DTYPES
    if args.device == "cpu" and op not in WHOLE:
        return ("bf16", "f32")
    one = ("rms_norm_qkv", *LINEAR, "decode_attention", "host", *WHOLE)
    return ("bf16",) if args.quick or op in one else ALL_DTYPES


def bench(op: str, args: argparse.Namespace, path: str | None) -> None:
    import torch

    import minivllm
    from benchmarks import (
        accuracy,
        act_and_mul,
        attention,
        first_token,
        generate,
        host,
        linear,
        model,
        model_accuracy,
        norms,
        qkv,
        regret,
        step,
    )
    from benchmarks.report import Report
    from minivllm.testing.timing import busy_cuda

    modules = {"host": host, "accuracy": accuracy, "rms_norm_qkv": qkv}
    modules |= {"model": model, "model_accuracy": model_accuracy, "step": step}
    modules |= {"first_token": first_token, "generate": generate}
    modules |= {"decode_attention": attention, "regret": regret}
    modules |= dict.fromkeys(LINEAR, linear) | dict.fromkeys(ACTIVATIONS, act_and_mul)
    module = modules.get(op, norms)
    options = argparse.Namespace(**vars(args) | {"dtype": dtypes(op, args)})
    if options.kernel is None:
        options.kernel = ["all"] if args.device == "cuda" and not args.quick else []
    if args.device == "cuda":
        busy_cuda()
    if args.threads is not None:
        minivllm.set_num_threads(args.threads)
    report = Report(op, args.device, sys.argv[1:], path, module.METHOD, args.commit)
    with torch.inference_mode():
        if module in (norms, act_and_mul, linear):
            module.run(op, options, report)
        else:
            module.run(options, report)
    report.close()


def main() -> int:
    args = parser().parse_args()
    if args.op == "all" and (args.shapes or args.tokens):
        parser().error("all takes no --shapes and no --tokens: they mean different things to different ops")
    for package in {"plot": ("matplotlib",), "tables": (), **dict.fromkeys(WHOLE, ("torch", "transformers"))}.get(
        args.op, ("torch",)
    ):
        if importlib.util.find_spec(package) is None:
            parser().error(f"{args.op} needs {package}: pip install {package}")
    if args.op == "plot":
        from benchmarks import plot

        return plot.draw(Path(args.results), Path(args.output) if args.output else None)
    if args.op == "tables":
        from benchmarks import tables

        return tables.update(Path(args.results))

    import torch

    if error := shape_error(args.op, args.shapes):
        parser().error(error)
    if error := regret_error(args):
        parser().error(error)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no GPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cpu":
        hold_onednn(args.onednn_isa)
    for op in OPS if args.op == "all" else (args.op,):
        path = f"{args.json_dir}/{args.device}_{op}.json" if args.json_dir else args.json
        bench(op, args, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
