"""Whose code a module runs: what fused modules stand in for, and whether it still is what it was when they came."""

from __future__ import annotations

import importlib
import inspect
import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, eager_mask, sdpa_mask

from ..nn import NotFusedWarning

Rounding = Literal["hf", "fp32"]
RECORDERS = "transformers.utils.output_capturing"  # its hooks stay on the modules, and act where outputs are asked for
MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
ROTARY = ("apply_rotary_pos_emb", "rotate_half")
NUMBERS = itertools.count()
ALIVE: weakref.WeakValueDictionary[int, Numbered] = weakref.WeakValueDictionary()


class Numbered:
    """Something that a function which torch.compile takes for a constant can be told of: by a number. Dynamo of torch
    2.11 hands over no objects."""

    number: int

    def why_not_now(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call with these arguments has to run the code of a class; None if it need not."""
        raise NotImplementedError

    def enter(self) -> None:
        self.number = next(NUMBERS)
        ALIVE[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what comes out of a pickle, is another one."""
        self.__dict__.update(state)
        self.enter()


class Traits(NamedTuple):
    """What an architecture has that Llama has not, by the names that transformers gives to it.

    model: the class of the decoder, where it is not called as the family is. norms: of a layer, two, or four where the
    second and the last stand behind attention and MLP, whose results they norm before the residual joins. eps,
    weight_offset: of every norm. multiplier: of what joins the residual. window, soft_cap: where they are, on the
    attention or on its configuration. may_lack_rope: some layers turn nothing. dropouts: between the parts of a layer.
    by_layer: the forward of the decoder takes a mask for each kind of layer.
    """

    model: str = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"
    eps: str = "variance_epsilon"
    weight_offset: float = 0.0
    multiplier: str = ""
    window: Literal["", "attention", "config"] = ""
    soft_cap: str = ""
    may_lack_rope: bool = False
    dropouts: tuple[str, ...] = ()
    by_layer: bool = False


_GEMMA = Traits(
    norms=(*Traits().norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"), eps="eps", weight_offset=1.0,
    window="attention", by_layer=True)  # fmt: skip
TRAITS = {
    "Llama": Traits(),
    "Qwen2": Traits(window="attention", by_layer=True),
    "Qwen3": Traits(window="attention", by_layer=True),
    "Mistral": Traits(window="config"),
    "Granite": Traits(multiplier="residual_multiplier"),
    "SmolLM3": Traits(window="attention", may_lack_rope=True, by_layer=True),
    "Phi3": Traits(
        projections=("qkv_proj",), gate_up=("gate_up_proj",), activation="activation_fn", window="config",
        dropouts=("resid_attn_dropout", "resid_mlp_dropout")),
    "Gemma2": _GEMMA._replace(soft_cap="attn_logit_softcapping"),
    "Gemma3": _GEMMA._replace(model="Gemma3TextModel"),
}  # fmt: skip
LEFT_ALONE = {"Olmo2Model": "OLMo 2 norms all heads of q and of k at once, which no op here does"}


class Family:
    """The classes of one architecture, by its name."""

    def __init__(self, name: str, traits: Traits) -> None:
        self.name, self.traits = name, traits
        self.module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
        self.model: Any = getattr(self.module, traits.model or f"{name}Model")
        self.model_type: str = self.model.config_class.model_type
        self.causal: type[torch.nn.Module] = getattr(self.module, f"{name}ForCausalLM")
        self.layer: type[torch.nn.Module] = getattr(self.module, f"{name}DecoderLayer")
        self.attention: type[torch.nn.Module] = getattr(self.module, f"{name}Attention")
        self.norm: type[torch.nn.Module] = getattr(self.module, f"{name}RMSNorm")
        self.mlp: type[torch.nn.Module] = getattr(self.module, f"{name}MLP")
        self.mlp_forward = self.mlp.forward

    def norm_options(self, norm: Any, rounding: Rounding) -> dict[str, Any]:
        """How the ops have a norm of this family. One with an offset rounds once in transformers, too."""
        offset = self.traits.weight_offset
        return {
            "eps": getattr(norm, self.traits.eps),
            "weight_offset": offset,
            "rounding": "fp32" if offset else rounding,
        }

    def head_options(self, head_norms: tuple[Any, ...], rounding: Rounding) -> dict[str, Any]:
        """How the ops have the norms of q's and k's heads, if there are any, with the rotary embedding behind them."""
        if not head_norms:
            return {"rounding": rounding}
        q_norm, k_norm = head_norms
        options = self.norm_options(q_norm, rounding) | {"q_norm_weight": q_norm.weight, "k_norm_weight": k_norm.weight}
        return options | {"rounding": "hf_once" if rounding == "hf" and self.traits.weight_offset else rounding}

    def window(self, attention: Any) -> int | None:
        """How many keys a token sees, itself included; None: all in front of it."""
        where = self.traits.window
        holder = attention.config if where == "config" else attention
        return getattr(holder, "sliding_window", None) if where else None

    def soft_cap(self, attention: Any) -> float | None:
        return getattr(attention, self.traits.soft_cap) if self.traits.soft_cap else None

    def makes_causal_masks(self, config: Any) -> bool:
        """Whether a model of this family that is given no mask makes causal ones, by the functions of transformers."""
        functions, name = ALL_MASK_ATTENTION_FUNCTIONS, config._attn_implementation
        return (
            name in MASKS
            and functions[name] is MASKS[name]
            and getattr(self.module, "create_causal_mask", None) is create_causal_mask
            and getattr(config, "is_causal", True)
            and not getattr(config, "use_bidirectional_attention", False)
        )

    def multiplier(self, layer: Any) -> float:
        """Of what attention and MLP add to the residual."""
        return float(getattr(layer, self.traits.multiplier)) if self.traits.multiplier else 1.0

    def __reduce__(self) -> tuple[Callable[[str], Family], tuple[str]]:
        """There is one of each name, also for copies and pickles."""
        return family_of, (self.name,)

    def functions(self) -> tuple[object, ...]:
        """What fused modules stand in for, as it is now. Eight reads, because every layer asks in every call."""
        module, rotary = self.module, self.module.apply_rotary_pos_emb
        return (
            rotary, "forward" in rotary.__dict__ and is_replaced(rotary), module.rotate_half, self.layer.forward,
            self.attention.forward, self.norm.forward, torch.nn.Linear.forward, F.linear)  # fmt: skip

    def why_not_functions(self) -> str | None:
        """Whether the functions around the classes are the ones that these came with."""
        for name in ROTARY:
            function = getattr(self.module, name)
            if isinstance(function, torch.nn.Module) and not is_replaced(function):
                # With the package `kernels` it is a module around the function that stands in the source.
                function = inspect.getclosurevars(type(function).forward).nonlocals.get("func")
            if getattr(function, "__globals__", None) is not vars(self.module):
                return f"{name} of {self.module.__name__} was replaced"
        if F.linear is not torch._C._nn.linear:
            return "torch.nn.functional.linear was replaced"
        return None

    def why_replaced(
        self, modules: Mapping[str, torch.nn.Module], expected: Mapping[str, type[torch.nn.Module]]
    ) -> str | None:
        """Whether some modules, by name, are not exactly of the expected classes, with the code that these came with:
        functions of their own library, which may have wrapped them."""
        for name, module in modules.items():
            what, kind = f"{name} is" if name else "it is", type(module)
            if kind is not expected[name]:
                return f"{what} a {full_name(kind)}, expected {expected[name].__qualname__}"
            home = kind.__module__.partition(".")[0]
            written_in = getattr(kind.forward, "__globals__", {}).get("__name__", "")
            if is_replaced(module) or written_in.partition(".")[0] != home:
                return f"{what} a {kind.__qualname__} whose forward was replaced"
        return None


FAMILIES = {name: Family(name, traits) for name, traits in TRAITS.items()}


def family_of(name: str) -> Family:
    return FAMILIES[name]


class Applied(Numbered):
    """What the fused modules of one decoder have in common: their family with its functions as `apply` found them, the
    rounding of every norm, and the report's fallbacks and attentions, by layer name. Lives on the decoder and on its
    final norm as `_minivllm`."""

    def __init__(
        self, family: Family, rounding: Rounding, fallbacks: dict[str, str], attentions: dict[str, str]
    ) -> None:
        self.family, self.rounding, self.fallbacks, self.attentions = family, rounding, fallbacks, attentions
        self.functions = family.functions()
        self.model_forward = family.model.forward
        self.has_warned = False
        self.enter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Applied:
        """Of a copy of the model: the functions are the very same."""
        twin = memo[id(self)] = object.__new__(Applied)
        twin.__setstate__(self.__dict__ | {"fallbacks": dict(self.fallbacks), "attentions": dict(self.attentions)})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return came_out_of_a_pickle, (self.family, self.rounding)

    def why_not_now(self, kwargs: dict[str, Any]) -> str | None:
        """Why the code of the classes has to run, whatever the modules are."""
        if self.family.functions() != self.functions:
            return "its code was replaced after apply, in its class, in its module or in torch.nn: apply again"
        return None

    def warn_once(self, text: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(text, NotFusedWarning, stacklevel=2)


def came_out_of_a_pickle(family: Family, rounding: Rounding) -> Applied:
    """A forward that `apply` put in place is pickled as the one of its class, so what comes back is not fused."""
    warnings.warn(
        "a model to which minivllm.transformers.apply was applied came out of a pickle: it runs the code of its "
        "classes until you apply again",
        NotFusedWarning,
        stacklevel=2,
    )
    return Applied(family, rounding, {}, {})


def full_name(kind: type) -> str:
    """The name of a class, and of its module where somebody else than torch and transformers wrote it: adapters call
    their classes Linear, too."""
    home = kind.__module__
    own = home == "__main__" or home.partition(".")[0] in ("torch", "transformers")
    return kind.__qualname__ if own else f"{home}.{kind.__qualname__}"


def is_watched(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    """Whether some forward hooks are more than those by which transformers records outputs."""
    return any(hook.__module__ != RECORDERS for hook in hooks.values())


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether a module has a forward of its own in place of its class's."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_fused(module: torch.nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether `forward`, one of ours, stands in for the module's own."""
    own = module.__dict__.get("forward")
    return isinstance(own, types.MethodType) and own.__func__ is forward  # as Dynamo of torch 2.11 can follow it


def is_intercepted() -> bool:
    """Whether a TorchFunctionMode is active, other than that of torch.set_default_device, which only says where new
    tensors are: it would not see what goes on inside the fused ops."""
    if not torch._C._len_torch_function_stack():
        return False
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)
