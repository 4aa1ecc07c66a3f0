"""Runs a case, and judges it: results against float64, memory around the tensors, inputs, the same bits once more."""

import random
import re

import numpy as np

import minivllm
from fuzz import expect
from fuzz.cases import OPS
from fuzz.drawing import Case, forceable, members, parameters
from fuzz.memory import to_numpy
from fuzz.values import same_bits
from minivllm.testing.reference import namespace, round_to

LAYER_CALL = ("x", "residual", "out", "residual_out")  # what the layer object takes at the call


class Wrong(AssertionError):
    """A result that is not what the contract says."""


class Stray(AssertionError):
    """Memory that a call had no business to write."""


def require(condition, what: str, kind=Wrong):
    if not condition:
        raise kind(what)


def call(case: Case, arguments: dict, **changes):
    """The call itself; `changes` replace arguments, and None removes them."""
    removed = {name for name, value in changes.items() if value is None}
    arguments = {name: value for name, value in (arguments | changes).items() if name not in removed}
    if case.op != "FusedRMSNormQKV":
        return getattr(minivllm, case.op)(**arguments)
    at_call = {name: arguments.pop(name) for name in LAYER_CALL if name in arguments}
    return minivllm.FusedRMSNormQKV(**arguments)(at_call.pop("x"), **at_call)


def prepare(case: Case, memory) -> dict:
    """The arguments of the case, its tensors in this memory."""

    def placed(specs):
        return tuple(map(memory.tensor, specs)) if len(members(specs)) > 1 else memory.tensor(specs)

    return {name: placed(specs) for name, specs in case.tensors.items()} | case.options


def inputs_of(case: Case, memory, blocks) -> dict:
    """The values of the tensors in these blocks of bytes, in float64 and where `memory` computes with them; a weight is
    one matrix [outputs, hidden]."""
    found = {}
    for name, specs in case.tensors.items():
        parts = [memory.wide(spec, blocks[spec.block]) for spec in members(specs)]
        if name == matrix_of(case) and is_in_out(case):
            parts = [part.T for part in parts]
        found[name] = parts[0] if len(parts) == 1 else namespace(parts[0]).concatenate(parts)
    return found


def matrix_of(case: Case) -> str | None:
    """The argument that is a matrix, if the op has one."""
    if "weight_layout" not in parameters(case.op):
        return None
    return next(name for name in ("qkv_weight", "gate_up_weight", "weight") if name in case.tensors)


def gives_sum(case: Case) -> bool:
    """Whether x + residual is a result."""
    return "residual" in case.tensors and case.op not in ("linear_add", "norm_add")


def is_in_out(case: Case) -> bool:
    """As the shapes say, or the option where they could be either."""
    hidden = case.tensors["x"].shape[-1]
    for spec in members(case.tensors[matrix_of(case)]):
        if spec.shape[0] != spec.shape[1]:
            return spec.shape[1] != hidden
    return case.options.get("weight_layout") == "in_out"


def check_memory(case: Case, memory, written):
    """No byte has changed but those of the outputs."""
    for index, block in enumerate(case.blocks):
        after = memory.after(index)
        if after is not block.image and np.array_equal(after, block.image):
            continue
        kept = after.copy()
        for name in written:
            spec = case.tensors[name]
            if spec.block == index:
                spec.of(kept)[...] = spec.of(block.image)
        changed = np.flatnonzero(kept != block.image)
        if changed.size:
            names = [name for name, specs in case.tensors.items() for s in members(specs) if s.block == index]
            raise Stray(
                f"{changed.size} bytes changed that are no output, the first at byte {changed[0]} of {block.image.size} "
                f"in the block of {', '.join(names)}"
            )


def results_of(case: Case, returned, lead: tuple) -> dict:
    """out and residual_out, [*lead, ...], whatever the op returns, as NumPy arrays of the dtype."""
    dtype = case.tensors["x"].dtype
    if "num_heads" not in case.options:
        parts = returned if isinstance(returned, tuple) else (returned,)
        names = ("out", "residual_out")
        require(len(parts) == 1 + gives_sum(case), f"{len(parts)} results")
        return {name: to_numpy(part, dtype) for name, part in zip(names, parts)}
    require(len(returned) == 3 + ("residual" in case.tensors), f"{len(returned)} results")
    kv_heads = case.options["num_kv_heads"]
    q, k, v = (to_numpy(part, dtype) for part in returned[:3])
    for part, heads in zip((q, k, v), (case.options["num_heads"], kv_heads, kv_heads)):
        require(part.shape == (*lead, heads, q.shape[-1]), f"a result of shape {part.shape}")
    outputs = q.shape[-1] * (q.shape[-2] + k.shape[-2] + v.shape[-2])
    out = np.concatenate([q, k, v], -2).reshape(*lead, outputs)
    found = {"out": out}
    if len(returned) == 4:
        found["residual_out"] = to_numpy(returned[3], dtype)
    return found


def compare(first: dict, second: dict, what: str):
    for name, values in first.items():
        require(values.shape == second[name].shape, f"{what}: {name} has shape {second[name].shape}")
        if values.tobytes() != second[name].tobytes():
            same = same_bits(values, second[name])
            places = np.argwhere(~same)
            first_place = tuple(map(int, places[:1].ravel()))
            require(same.all(), f"{what}: {name} differs in {len(places)} places, the first {first_place}")


class Judge:
    """What the case must give, made once for all calls of it: for the values that its blocks hold before the call, or
    those of other blocks. On a GPU the GPU computes it, by torch in float64: a large product takes the CPU seconds."""

    def __init__(self, case: Case, memory, blocks=None):
        self.dtype, self.memory = case.tensors["x"].dtype, memory
        inputs = inputs_of(case, memory, blocks or [block.image for block in case.blocks])
        self.expected = OPS[case.op].expect(inputs, case.judged_by(), self.dtype, case.wild)
        self.sums = round_to(inputs["x"] + inputs["residual"], self.dtype) if gives_sum(case) else None

    def check(self, results: dict, what: str = ""):
        got = {name: self.memory.computed(values.astype(np.float64)) for name, values in results.items()}
        wrong = expect.first_wrong(got["out"], self.expected, self.dtype)
        require(wrong is None, f"{what}out{wrong}")
        if self.sums is not None:
            sums, xp = got["residual_out"], namespace(self.sums)
            good = (sums == self.sums) | (xp.isnan(sums) & xp.isnan(self.sums))
            require(good.all(), f"{what}residual_out is wrong in {int((~good).sum())} places")


def refusal(case: Case, arguments: dict, memory) -> bool:
    """The call must be refused, with a message of the op's and without a trace; gives back True."""
    exception, pattern = case.refused or (ValueError, case.may_refuse)
    try:
        returned = call(case, arguments)
    except exception as error:
        text = str(error)
        names = (case.op, "rms_norm_qkv") if case.op == "FusedRMSNormQKV" else (case.op,)
        require(text.startswith(tuple(f"{name}: " for name in names)), f"a message without the op's name: {text}")
        require(re.search(pattern, text), f"refused for another reason than {pattern!r}: {text}")
        check_memory(case, memory, ())
        return True
    require(case.refused is None, f"was not refused, expected {exception.__name__}: {pattern}")
    del returned
    return False


def run(case: Case, memory) -> tuple[int, int]:
    """(calls made, calls refused); AssertionError when anything is wrong."""
    arguments = prepare(case, memory)
    lead = case.tensors["x"].shape[:-1]
    if case.refused:
        refusal(case, arguments, memory)
        return 1, 1
    minivllm.set_num_threads(case.threads)
    if case.may_refuse and refusal(case, arguments, memory):
        return 1, 1
    if case.may_refuse:
        memory.restore(case.blocks)
    results = results_of(case, call(case, arguments), lead)
    results = {name: values.copy() for name, values in results.items()}
    check_memory(case, memory, case.outputs.values())
    for name, argument in case.outputs.items():
        spec = case.tensors[argument]
        written = np.ascontiguousarray(spec.of(np.asarray(memory.after(spec.block))))
        compare({name: written}, results, "what was written and what was returned")
    judge = Judge(case, memory)
    judge.check(results)
    made = 1 + again(case, arguments, memory, results)
    return made + other_kernels(case, arguments, memory, judge), 0


def other_kernels(case: Case, arguments: dict, memory, judge: Judge) -> int:
    """The same call by every kernel that can be forced, where none was; how many calls that took."""
    if "kernel" in arguments or "kernel" not in parameters(case.op):
        return 0
    names = forceable(case.op, case.tensors["x"].dtype, case.device)
    for name in names:
        memory.restore(case.blocks)
        try:
            returned = call(case, arguments, kernel=name)
        except ValueError as error:
            may_refuse = case.device == "cuda" or case.options.get("batch_invariant")
            require(may_refuse and f"kernel '{name}' cannot serve this call" in str(error), f"{name}: {error}")
            continue
        judge.check(results_of(case, returned, case.tensors["x"].shape[:-1]), f"{name}: ")
        check_memory(case, memory, case.outputs.values())
    return len(names)


def again(case: Case, arguments: dict, memory, results: dict) -> int:
    """The same bits once more, in how many calls: into fresh outputs, with other threads where these must not matter,
    and where other rows must not matter one row alone."""
    lead = case.tensors["x"].shape[:-1]
    invariant = matrix_of(case) is None or case.options.get("batch_invariant", False)
    in_place = "x" in case.outputs.values()
    fresh = {} if in_place else dict.fromkeys(case.outputs.values())
    written = case.outputs.values() if in_place else ()
    if invariant:
        minivllm.set_num_threads(1 + case.threads % 4)
    memory.restore(case.blocks)
    compare(results_of(case, call(case, arguments, **fresh), lead), results, "the same call again")
    check_memory(case, memory, written)
    if not invariant or 0 in lead or lead == ():
        return 1
    memory.restore(case.blocks)
    rng = random.Random(case.name)
    row = tuple(rng.randrange(size) for size in lead)
    alone = {name: arguments[name][row] for name in ("x", "residual") if name in arguments}
    one = results_of(case, call(case, arguments, **fresh, **alone), ())
    compare(one, {name: np.ascontiguousarray(values[row]) for name, values in results.items()}, f"row {row} alone")
    check_memory(case, memory, written)
    return 2
