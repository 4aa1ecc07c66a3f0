"""One argument of a call is no honest tensor, or a value that no argument takes: the op must answer with the documented
exception and its own name in it, or do what was asked; and the next honest call must give what it always gave."""

import functools
import math
import random

import numpy as np

import minivllm
from fuzz import calls, cases
from fuzz.calls import Wrong, compare, require
from fuzz.drawing import Case, members, parameters
from fuzz.hostile import ANY, FINE, REFUSED, TENSORS, Own, Stop
from fuzz.plain import Plain, is_plain


def why_not() -> str | None:
    return None


def prepare():
    np.seterr(all="ignore")


class Raises:
    """Every way to ask for its value raises."""

    def __init__(self, error):
        self.error = error

    def _raise(self, *_):
        raise self.error

    __index__ = __int__ = __float__ = __bool__ = __len__ = __iter__ = __eq__ = __hash__ = __repr__ = _raise


class Text(str):
    """Equal to everything, and not what it says."""

    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


VALUES = (
    None, True, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 2**200, 0.0, 0.5, -1.0, float("nan"), float("inf"), 1e300, 1j, "", "hf",
    "auto", "no such thing", "\0", "x" * 100_000, "\ud800", b"hf", (), [], {}, [1.0], object(), len, int, NotImplemented, Ellipsis,
    np.float32(1), np.int64(3), np.bool_(True), np.array(3), np.ones(3), Raises(Own("raised")), Raises(Stop()), Text("hf"),
)  # fmt: skip


def honest(seed: int, index: int) -> Plain:
    """A small case that must be served, of the op whose turn it is."""
    return Plain(cases.draw(seed, index, allowed=is_plain))


class Attack:
    """What is done in the case of this seed and index."""

    def __init__(self, seed: int, index: int):
        self.honest = honest(seed, index)
        rng = random.Random((seed << 41) + index)
        case = self.honest.case
        self.what, self.member, self.expected, self.value = "", None, None, None
        everything = sorted(parameters(case.op) - {"kernel"})
        if rng.random() < 0.75:
            self.argument = rng.choice(sorted(case.tensors))
            is_tuple = len(members(case.tensors[self.argument])) > 1
            if is_tuple:
                self.member = rng.choice((*range(len(members(case.tensors[self.argument]))), None))
            self.what = rng.choice(sorted(TENSORS))
            kind = TENSORS[self.what]
            written = case.outputs.values()
            is_output = self.argument in written
            self.expected = (kind.for_output or kind.answer) if is_output else kind.answer
            if not is_output and any(case.tensors[self.argument] == case.tensors[name] for name in written):
                self.expected = ANY  # an output is the same memory, by an honest name
            # An honest result, or a refusal: of an output whose class has no slices; of what cannot be copied.
            specs = members(case.tensors[self.argument])
            if self.what == "odd strides" and all(math.prod(spec.shape) <= 1 for spec in specs):
                self.expected = ANY  # of single values no stride is read
            if is_tuple and self.member is None:
                self.expected = ANY  # one tensor in place of several is another call, which may be right
            copied = case.options.get("prepack") and self.argument == "qkv_weight"
            self.lenient = is_output or copied
        elif rng.random() < 0.8:
            self.argument, self.value = rng.choice([*everything, "nonsense"]), rng.choice(VALUES)
        else:
            self.argument, self.value = "the number of arguments", rng.randint(0, 40)

    def __str__(self):
        member = "" if self.member is None else f"[{self.member}]"
        what = self.what or (
            repr(self.value)[:60] if isinstance(self.value, (int, float)) else type(self.value).__name__
        )
        return f"{self.argument}{member} is {what}, in\n{self.honest.case}"


def describe(seed: int, index: int) -> str:
    return str(Attack(seed, index))


def check_message(case: Case, error: BaseException):
    names = (case.op, "rms_norm_qkv") if case.op == "FusedRMSNormQKV" else (case.op,)
    text = str(error)
    if isinstance(error, RuntimeError) and "CUDA" in text:
        return  # what is wrong with the machine or the build is not the op's
    require(any(name in text for name in names), f"{type(error).__name__} without the op's name: {text[:300]}")


def answer(attack: Attack, act, allowed, right: dict | None):
    """Calls act; what it raises must be one of `allowed`, or its result right where there is one to compare with."""
    case = attack.honest.case
    try:
        results = act()
    except Stop:
        require(allowed is None or Stop in allowed, "another's BaseException")
        return 1
    except (Own, RecursionError, MemoryError) as error:
        require(allowed is None or type(error) in allowed, f"{type(error).__name__} went through")
        return 1
    except Exception as error:  # noqa: BLE001 -- which ones are documented is what is tested
        expected = (*REFUSED, OverflowError, RuntimeError) if allowed is None else allowed
        if not isinstance(error, tuple(expected)):
            raise Wrong(f"{type(error).__name__}, expected one of {[e.__name__ for e in expected]}: {error}") from error
        check_message(case, error)
        return 1
    if allowed is not None:
        require(right is not None, f"was taken, expected one of {[e.__name__ for e in allowed]}")
    if right is not None:
        compare(right, results, "the result")
    return 0


def run(seed: int, index: int) -> tuple[int, int]:
    attack = Attack(seed, index)
    plain = attack.honest
    right = plain.results(plain.arguments())
    arguments = plain.arguments()
    if attack.what:
        refused = attack_tensor(attack, arguments, right)
    elif attack.argument == "the number of arguments":
        refused = attack_count(attack, arguments)
    else:
        refused = attack_value(attack, arguments)
    compare(right, plain.results(plain.arguments()), "an honest call afterwards")
    return 3, refused


def attack_tensor(attack: Attack, arguments: dict, right: dict) -> int:
    plain, kind = attack.honest, TENSORS[attack.what]

    def again():
        compare(right, plain.results(plain.arguments()), "a call inside of another")

    at, held = attack.argument, arguments[attack.argument]
    each = list(held) if isinstance(held, tuple) else [held]
    array = each[attack.member or 0]
    hostile = kind.make(array, again)
    each[attack.member or 0] = hostile
    arguments[at] = hostile if attack.member is None else tuple(each)

    def act():
        return plain.results(arguments, hostile, array)

    if attack.expected == ANY:
        return answer(attack, lambda: _any_call(attack, arguments), None, None)
    fine = attack.expected == FINE
    allowed = REFUSED if fine else attack.expected
    if attack.lenient and not fine:
        allowed = (*allowed, *REFUSED)
    if fine and attack.lenient:
        return answer(attack, act, allowed, right)
    if fine:
        compare(right, act(), "the result")
        return 0
    return answer(attack, act, allowed, None)


def attack_value(attack: Attack, arguments: dict) -> int:
    arguments[attack.argument] = attack.value
    if attack.argument == "nonsense":
        return answer(attack, lambda: _any_call(attack, arguments), (TypeError,), None)
    return answer(attack, lambda: _any_call(attack, arguments), None, None)


def _any_call(attack: Attack, arguments: dict):
    """Whatever comes back: an argument that is legal after all changes it."""
    op = attack.honest.case.op
    if op == "FusedRMSNormQKV":
        at_call = {name: arguments.pop(name) for name in calls.LAYER_CALL if name in arguments}
        return minivllm.FusedRMSNormQKV(**arguments)(**at_call)
    return getattr(minivllm, op)(**arguments)


def attack_count(attack: Attack, arguments: dict) -> int:
    """So many arguments by position, taken from what would be right by name."""
    op = attack.honest.case.op
    order = [*arguments.values()] * 40
    function = getattr(minivllm, op)
    act = functools.partial(function, *order[: attack.value])
    return answer(attack, act, None, None)
