"""One line turns a loaded Llama, Qwen2 or Qwen3 of transformers >= 5 into one on the fused ops.

    import minivllm.transformers
    report = minivllm.transformers.apply(model)
    print(report)
    model.generate(...)
    report.undo()

What a fused layer computes, and when it steps aside, is in layer.py; docs/transformers.md is for users.
"""

import importlib
import types
from typing import NamedTuple

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"minivllm.transformers needs transformers >= 5, found {transformers.__version__}")

from minivllm import _C  # noqa: E402
from minivllm.transformers.layer import (  # noqa: E402
    DTYPES,
    FusedLayer,
    is_fused,
    is_replaced,
    is_watched,
    layer_forward,
    model_forward,
    norm_forward,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
BACKENDS = ("cpu", "cuda")
ROUNDINGS = ("hf", "fp32")
FUSED_TOKENS = 64  # on an H100 three products of cuBLAS catch up with the mma.sync kernels about here
TRACED_TOKENS = 1024  # and with those of Hopper here, when torch.compile fuses the norm with what is in front of it


class Family(NamedTuple):
    """The classes of one architecture."""

    module: types.ModuleType
    model: type
    layer: type
    attention: type
    norm: type


def _family(name):
    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    return Family(module, *(getattr(module, name + part) for part in ("Model", "DecoderLayer", "Attention", "RMSNorm")))


FAMILIES = tuple(map(_family, ("Llama", "Qwen2", "Qwen3")))


class Report:
    """What `apply` did.

    fused: the names of the layers and norms that run on the fused ops. left_alone: of those that do not, why, by name.
    fallbacks: filled while the model runs: of fused layers that ran the code of their class in some call, the newest
    reason, by name. packed_bytes: the size of the matrices that packed=True made, in place of the weights' own memory.
    """

    def __init__(self, model):
        self._model = model
        self.fused = []
        self.left_alone = {}
        self.fallbacks = {}
        self.packed_bytes = 0

    def undo(self):
        """Gives the model back its own code; see `undo`."""
        undo(self._model)

    def __repr__(self):
        lines = [f"minivllm: {len(self.fused)} modules fused, {len(self.left_alone)} left alone"]
        for title, reasons in (("left alone", self.left_alone), ("ran the code of its class", self.fallbacks)):
            lines += [f"  {name or 'the model'}: {title}: {why}" for name, why in reasons.items()]
        return "\n".join(lines)


def apply(model, *, packed=False, fused_tokens="auto", rounding="fp32"):
    """Puts the fused ops into every Llama, Qwen2 and Qwen3 decoder inside `model`, and returns a Report.

    model: a torch module, such as what AutoModelForCausalLM.from_pretrained returned. Its weights stay where they are
    and state_dict() stays as it is. packed: moves the q, k and v weights of a layer into one matrix of which the three
    Parameters are views, which makes one product of three where there are many tokens. fused_tokens: calls with more
    tokens (batch x length) than this take a norm and torch's linear instead of the fused norm and projection; None:
    never; "auto": FUSED_TOKENS on a GPU that has no kernel for Hopper's tensor cores in the model's dtype, else None,
    but TRACED_TOKENS on a GPU under torch.compile. A compiled call looks at hooks when it is traced, as torch does:
    torch.compiler.reset() after adding one.
    rounding: of every norm, as the ops have it. "fp32" rounds once, which is closer to the same model in float32; "hf"
    twice, as transformers does.

    What cannot be fused is left alone and named in the report. Applied anew, it starts from the model's own code.

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
        family = next((family for family in FAMILIES if type(decoder) is family.model), None)
        if family is None:
            continue
        prefix = f"{name}." if name else ""
        if why := _why_replaced(family, {"": decoder}, {"": family.model}):
            report.left_alone[name] = why
            continue
        for index, layer in decoder.layers.named_children():
            _apply_to_layer(family, f"{prefix}layers.{index}", layer, packed, fused_tokens, rounding, report)
        if why := _why_not_norm(family, decoder.norm):
            report.left_alone[f"{prefix}norm"] = why
        else:
            decoder.norm._minivllm = rounding
            decoder.norm.forward = types.MethodType(norm_forward, decoder.norm)
            report.fused.append(f"{prefix}norm")
        decoder.forward = types.MethodType(model_forward, decoder)
    if not report.fused and not report.left_alone:
        known = ", ".join(family.model.__name__ for family in FAMILIES)
        report.left_alone[""] = f"{type(model).__name__} holds none of {known}"
    return report


def undo(model):
    """Gives every decoder that `apply` changed inside `model` its own code back, and packed weights their own memory.

    RuntimeError where somebody has meanwhile replaced a forward that `apply` put there: undo that first.
    """
    ours = []
    for name, module in model.named_modules():
        for forward in (model_forward, layer_forward, norm_forward):
            if is_fused(module, forward):
                ours.append(module)
                break
        else:
            if "_minivllm" in module.__dict__ and "forward" in module.__dict__:
                if is_replaced(module):
                    raise RuntimeError(f"undo: the forward of {name} was replaced after apply; take that back first")
                ours.append(module)  # out of a pickle, with the forward of its class
    for module in ours:
        del module.forward
        fused = module.__dict__.pop("_minivllm", None)
        if isinstance(fused, FusedLayer) and fused.is_packed():
            for linear in fused.projections:
                linear.weight.data = linear.weight.data.clone()


def _apply_to_layer(family, name, layer, packed, fused_tokens, rounding, report):
    why = _why_not_layer(family, layer)
    if why is not None:
        report.left_alone[name] = why
        return
    linears = [getattr(layer.self_attn, projection) for projection in PROJECTIONS]
    matrix = None
    if packed:
        matrix = torch.cat([linear.weight.detach() for linear in linears])
        parts = matrix.split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts):
            linear.weight.data = part
        report.packed_bytes += matrix.nbytes
    eager, traced = _default_limits(linears[0].weight) if fused_tokens == "auto" else (fused_tokens, fused_tokens)
    layer._minivllm = FusedLayer(name, layer, matrix, eager, traced, rounding, report.fallbacks)
    layer.forward = types.MethodType(layer_forward, layer)
    report.fused.append(name)


def _default_limits(weight):
    """fused_tokens="auto" for a weight of q_proj: eagerly, under torch.compile."""
    if weight.device.type == "cpu":
        return None, None
    fast = weight.dtype != torch.float32 and _capability(weight.device.index) == 90
    return (None, TRACED_TOKENS) if fast else (FUSED_TOKENS, FUSED_TOKENS)


def _capability(gpu):
    """90 for 9.0; 0 where this build has nothing for that GPU."""
    try:
        info = _C.cuda_device_info(gpu)
    except RuntimeError:
        return 0
    return info["compute_capability"] if info["usable"] else 0


def _why_not_layer(family, layer):
    """Why a decoder layer is left alone, or None."""
    attention = getattr(layer, "self_attn", None)
    expected = {"": family.layer, "self_attn": family.attention}
    expected |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), family.norm)
    expected |= dict.fromkeys((f"self_attn.{name}" for name in PROJECTIONS), torch.nn.Linear)
    if hasattr(attention, "q_norm"):
        expected |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), family.norm)
    try:
        modules = {name: layer.get_submodule(name) for name in expected}
    except AttributeError as error:
        return str(error)
    if why := _why_replaced(family, modules, expected):
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
    wq, wk, wv = (modules[f"self_attn.{name}"] for name in PROJECTIONS)
    if len({linear.bias is None for linear in (wq, wk, wv)}) > 1:
        return "some of q_proj, k_proj and v_proj have a bias and some have none"
    if (
        wq.out_features % attention.head_dim
        or wk.out_features % attention.head_dim
        or wk.out_features != wv.out_features
    ):
        return f"q_proj, k_proj and v_proj have {wq.out_features}, {wk.out_features} and {wv.out_features} outputs"
    return None


def _why_not_norm(family, norm):
    why = _why_replaced(family, {"": norm}, {"": family.norm})
    return why or _why_not_parameters(dict(norm.named_parameters()))


def _why_replaced(family, modules, expected):
    """Whether some modules, by name, are exactly of the expected classes, with the code that these came with."""
    for name, module in modules.items():
        what = f"{name} is" if name else "it is"
        if type(module) is not expected[name]:
            return f"{what} a {type(module).__qualname__}, expected {expected[name].__qualname__}"
        home = torch.nn.Linear.__module__ if expected[name] is torch.nn.Linear else family.module.__name__
        if is_replaced(module) or type(module).forward.__module__ != home:
            return f"{what} a {type(module).__qualname__} whose forward was replaced"
    return None


def _why_not_parameters(parameters):
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) > 1:
        return f"its weights differ in dtype or device: {', '.join(sorted(f'{d} on {where}' for d, where in kinds))}"
    for name, parameter in parameters.items():
        if type(parameter) is not torch.nn.Parameter:
            return f"{name} is a {type(parameter).__qualname__}, expected a plain Parameter"
        if parameter.dtype not in DTYPES:
            return f"{name} has dtype {parameter.dtype}, expected float32, float16 or bfloat16"
        if parameter.device.type not in BACKENDS:
            return f"{name} is on {parameter.device}, expected the CPU or CUDA"
        if parameter.device.type == "cuda" and not _C.cuda_archs():
            return f"{name} is on {parameter.device}, and this build of minivllm has no CUDA backend"
    return None
