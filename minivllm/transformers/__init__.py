"""One line turns a loaded Llama, Qwen, Mistral, Phi-3, Granite, SmolLM3 or Gemma of transformers >= 5 into one on the
fused ops.

    import minivllm.transformers
    report = minivllm.transformers.apply(model)
    print(report)
    model.generate(...)
    report.undo()

What a fused layer computes, and when it steps aside, is in layer.py; docs/transformers.md is for users.
"""

from __future__ import annotations

import functools
import importlib
import types
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"minivllm.transformers needs transformers >= 5, found {transformers.__version__}")

from .. import _C  # noqa: E402
from ..nn import NotFusedWarning  # noqa: E402
from .code import (  # noqa: E402
    FAMILIES,
    LEFT_ALONE,
    Applied,
    Family,
    Rounding,
    is_fused,
    is_replaced,
    is_watched,
)
from .head import Head, causal_forward  # noqa: E402
from .layer import DTYPES, FORWARDS, FusedLayer, can_norm, heads_of, layer_forward, model_forward, norm_forward  # noqa: E402
from .sharding import shard  # noqa: E402

if TYPE_CHECKING:
    from .decoder import Decoder
    from .generation import Generation, generate, last_generation

__all__ = [
    "Decoder", "Generation", "NotFusedWarning", "Report", "apply", "generate", "last_generation", "shard", "undo",
]  # fmt: skip

LAZY = {"Decoder": "decoder", "Generation": "generation", "generate": "generation", "last_generation": "generation"}

BACKENDS = ("cpu", "cuda")
ROUNDINGS = ("hf", "fp32")
FUSED_TOKENS = 64  # on an H100 three products of cuBLAS catch up with the mma.sync kernels about here
TRACED_TOKENS = 1024  # and with those of Hopper here, when torch.compile fuses the norm with what is in front of it


def __getattr__(name: str) -> Any:
    """Decoding, imported when it is asked for."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)


class Report:
    """What `apply` did.

    fused: the names of the layers and norms that run on the fused ops. left_alone: of those that do not, why, by name.
    fallbacks: filled while the model runs: of fused layers that ran the code of their class in some call, the newest
    reason, by name. attentions: likewise, of fused layers that left the attention of a decode step to transformers.
    packed_bytes: the size of the matrices that packed=True made, in place of the weights' own memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.fused: list[str] = []
        self.left_alone: dict[str, str] = {}
        self.fallbacks: dict[str, str] = {}
        self.attentions: dict[str, str] = {}
        self.packed_bytes = 0

    def undo(self) -> None:
        """Gives the model back its own code; see `undo`."""
        undo(self._model)

    def __repr__(self) -> str:
        lines = [f"minivllm: {len(self.fused)} modules fused, {len(self.left_alone)} left alone"]
        for title, reasons in (
            ("left alone", self.left_alone),
            ("ran the code of its class", self.fallbacks),
            ("left its attention to transformers", self.attentions),
        ):
            lines += [f"  {name or 'the model'}: {title}: {why}" for name, why in reasons.items()]
        return "\n".join(lines)


def apply(
    model: torch.nn.Module,
    *,
    packed: bool = False,
    fused_tokens: int | Literal["auto"] | None = "auto",
    rounding: Rounding = "fp32",
) -> Report:
    """Puts the fused ops into every decoder inside `model` that is a Llama, Qwen2, Qwen3, Mistral, Phi-3, Granite,
    SmolLM3, Gemma 2 or Gemma 3, and returns a Report.

    model: a torch module, such as what AutoModelForCausalLM.from_pretrained returned. Its weights stay where they are
    and state_dict() stays as it is. packed: moves the q, k and v weights of a layer into one matrix of which the three
    Parameters are views, which makes one product of three where there are many tokens. fused_tokens: calls with more
    tokens (batch x length) than this take norms and torch's linears instead of the ops that have both; None: never;
    "auto": by where the model is in the call, None on the CPU and on Hopper, but TRACED_TOKENS there for 16 bits under
    torch.compile; FUSED_TOKENS on other GPUs. A compiled call looks at hooks when it is traced, as torch does:
    torch.compiler.reset() after adding one.
    rounding: of every norm, as the ops have it. "fp32" rounds once, which is closer to the same model in float32; "hf"
    twice, as transformers does.

    What cannot be fused is left alone and named in the report. Applied anew, it starts from the model's own code.

    NotFusedWarning, a UserWarning, once each: nothing in the model can be fused; the model came out of a pickle, and so
    without this; in eval mode it is called with gradients on, for which it runs its own code.

    TypeError: model is no torch.nn.Module. ValueError: fused_tokens or rounding. RuntimeError: as `undo`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply: model is of type {type(model).__qualname__}, expected a torch.nn.Module")
    if not (fused_tokens in ("auto", None) or (type(fused_tokens) is int and fused_tokens >= 0)):
        raise ValueError(f"apply: fused_tokens is {fused_tokens!r}, expected 'auto', None or a number >= 0")
    if rounding not in ROUNDINGS:
        raise ValueError(f"apply: rounding is {rounding!r}, expected 'hf' or 'fp32'")
    undo(model)
    report = Report(model)
    for name, decoder in model.named_modules():
        family = next((family for family in FAMILIES.values() if type(decoder) is family.model), None)
        if family is None:
            if type(decoder).__name__ in LEFT_ALONE:
                report.left_alone[name] = LEFT_ALONE[type(decoder).__name__]
            continue
        prefix = f"{name}." if name else ""
        if why := family.why_replaced({"": decoder}, {"": family.model}) or family.why_not_functions():
            report.left_alone[name] = why
            continue
        applied = Applied(family, rounding, report.fallbacks, report.attentions)
        _apply_to_decoder(decoder, prefix, applied, packed, fused_tokens, report)
    _apply_to_heads(model)
    if not report.fused and not report.left_alone:
        known = ", ".join(family.model.__name__ for family in FAMILIES.values())
        report.left_alone[""] = f"{type(model).__name__} holds none of {known}"
    if not report.fused:
        name, why = next(iter(report.left_alone.items()))
        warnings.warn(f"apply: nothing was fused: {name or 'the model'}: {why}", NotFusedWarning, stacklevel=2)
    return report


def undo(model: torch.nn.Module) -> None:
    """Gives every decoder that `apply` changed inside `model` its own code back, and packed weights their own memory.

    RuntimeError where somebody has meanwhile replaced a forward that `apply` put there: undo that first.
    """
    ours: list[Any] = []
    for name, module in model.named_modules():
        if any(is_fused(module, forward) for forward in FORWARDS):
            ours.append(module)
        elif "_minivllm" in module.__dict__ and "forward" in module.__dict__:
            if is_replaced(module):
                raise RuntimeError(
                    f"undo: the forward of {name or 'the model'} was replaced after apply; take that back first"
                )
            ours.append(module)  # out of a pickle, with the forward of its class
    for module in ours:
        del module.forward
        fused = module.__dict__.pop("_minivllm", None)
        if isinstance(fused, FusedLayer) and fused.is_packed():
            for linear in fused.projections:
                linear.weight.data = linear.weight.data.clone()


def _apply_to_decoder(
    decoder: Any,
    prefix: str,
    applied: Applied,
    packed: bool,
    fused_tokens: int | Literal["auto"] | None,
    report: Report,
) -> None:
    for index, layer in decoder.layers.named_children():
        name = f"{prefix}layers.{index}"
        if why := _why_not_layer(applied.family, layer):
            report.left_alone[name] = why
        else:
            report.packed_bytes += _apply_to_layer(name, layer, applied, packed, fused_tokens)
            report.fused.append(name)
    if why := _why_not_norm(applied.family, decoder.norm):
        report.left_alone[f"{prefix}norm"] = why
    else:
        _put(decoder.norm, norm_forward, applied)
        report.fused.append(f"{prefix}norm")
    _put(decoder, model_forward, applied)


def _apply_to_heads(model: torch.nn.Module) -> None:
    """Every language model inside `model` that has its own code, and a decoder with a fused norm."""
    for module in model.modules():
        causal: Any = module
        family = next((family for family in FAMILIES.values() if type(causal) is family.causal), None)
        if family is None or family.why_replaced({"": causal}, {"": family.causal}):
            continue
        if is_fused(causal.model, model_forward) and is_fused(causal.model.norm, norm_forward):
            _put(causal, causal_forward(family), Head(causal, causal.model._minivllm, can_norm))


def _put(module: Any, forward: Any, minivllm: object) -> None:
    module._minivllm = minivllm
    module.forward = types.MethodType(forward, module)


def _apply_to_layer(
    name: str, layer: Any, applied: Applied, packed: bool, fused_tokens: int | Literal["auto"] | None
) -> int:
    """The bytes of the matrix that its weights were packed into, or 0."""
    linears = [getattr(layer.self_attn, projection) for projection in applied.family.traits.projections]
    matrix = None
    if packed and len(linears) > 1:
        matrix = torch.cat([linear.weight.detach() for linear in linears])
        parts = matrix.split_with_sizes([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts):
            linear.weight.data = part
    limits = _default_limits if fused_tokens == "auto" else functools.partial(_given_limits, fused_tokens)
    _put(layer, layer_forward, FusedLayer(name, layer, matrix, limits, applied))
    return 0 if matrix is None else matrix.nbytes


def _given_limits(fused_tokens: int | None, weight: torch.Tensor) -> tuple[int | None, int | None]:
    return fused_tokens, fused_tokens


def _default_limits(weight: torch.Tensor) -> tuple[int | None, int | None]:
    """fused_tokens="auto" for a weight of q_proj: eagerly, under torch.compile."""
    if weight.device.type == "cpu":
        return None, None
    if _capability(weight.device.index) != 90:
        return FUSED_TOKENS, FUSED_TOKENS
    return None, None if weight.dtype == torch.float32 else TRACED_TOKENS


def _capability(gpu: int) -> int:
    """90 for 9.0; 0 where this build has nothing for that GPU."""
    try:
        info = _C.cuda_device_info(gpu)
    except RuntimeError:
        return 0
    return int(info["compute_capability"]) if info["usable"] else 0


def _why_not_layer(family: Family, layer: torch.nn.Module) -> str | None:
    """Why a decoder layer is left alone, or None."""
    attention: Any = getattr(layer, "self_attn", None)
    traits = family.traits
    expected: dict[str, type[torch.nn.Module]] = {"": family.layer, "self_attn": family.attention}
    expected |= dict.fromkeys(traits.norms, family.norm) | dict.fromkeys(traits.dropouts, torch.nn.Dropout)
    expected |= dict.fromkeys((f"self_attn.{name}" for name in traits.projections), torch.nn.Linear)
    if hasattr(attention, "q_norm"):
        expected |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), family.norm)
    try:
        modules: dict[str, Any] = {name: layer.get_submodule(name) for name in expected}
    except AttributeError as error:
        return str(error)
    if why := family.why_replaced(modules, expected):
        return why
    for name, module in modules.items():
        hooks = {**module._forward_pre_hooks, **module._forward_hooks}
        if name and is_watched(hooks):
            return f"{name} has a hook, which would not be called"
    parameters = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        if name not in ("", "self_attn")
        for key, parameter in module.named_parameters()
    }
    if why := _why_not_parameters(parameters):
        return why
    linears: tuple[Any, ...] = tuple(modules[f"self_attn.{name}"] for name in traits.projections)
    if len({linear.bias is None for linear in linears}) > 1:
        return "some of q_proj, k_proj and v_proj have a bias and some have none"
    heads, kv_heads = heads_of(attention, linears)
    counts = (heads + 2 * kv_heads,) if len(linears) == 1 else (heads, kv_heads, kv_heads)
    outputs = [linear.out_features for linear in linears]
    if outputs != [count * attention.head_dim for count in counts]:
        return f"{', '.join(traits.projections)} have {', '.join(map(str, outputs))} outputs"
    return None


def _why_not_norm(family: Family, norm: torch.nn.Module) -> str | None:
    return family.why_replaced({"": norm}, {"": family.norm}) or _why_not_parameters(dict(norm.named_parameters()))


def _why_not_parameters(parameters: dict[str, Any]) -> str | None:
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) > 1:
        return f"its weights differ in dtype or device: {', '.join(sorted(f'{d} on {where}' for d, where in kinds))}"
    for name, parameter in parameters.items():
        if type(parameter) is not torch.nn.Parameter:
            return f"{name} is a {type(parameter).__qualname__}, expected a plain Parameter"
        if parameter.dtype not in DTYPES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"{name} has dtype {dtype}, which is not supported; expected float32, float16 or bfloat16"
        if parameter.device.type not in BACKENDS:
            return f"{name} is on {parameter.device}, expected the CPU or CUDA"
        if parameter.device.type == "cuda" and not _C.cuda_archs():
            return f"{name} is on {parameter.device}, and this build of minivllm has no CUDA backend"
    return None
