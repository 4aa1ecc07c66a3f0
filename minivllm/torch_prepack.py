"""The copy of its weights that a layer with prepack=True computes with, where they are torch tensors.

It knows no way back to them, so a gradient that ends there must not be lost in silence. Weights may come to require
grad after they were copied, and layers are copied and pickled; so the copy keeps the weights, and asks them.
"""

import copy
import operator

import torch

_requires_grad = operator.attrgetter("requires_grad")


class PackedWeight(torch.Tensor):
    """Requires grad where one of `weights` does now: the C function, which asks that of every tensor in grad mode,
    then hands the call over. A tensor as plain as a Parameter in every other way."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def requires_grad(self):
        return any(map(_requires_grad, self.weights))

    def __reduce_ex__(self, protocol):
        return packed, (self.plain, self.weights)

    def __deepcopy__(self, memo):
        return packed(*copy.deepcopy((self.plain, self.weights), memo))


def packed(copied, weights):
    """`copied`, a tensor with the values of `weights`, as a PackedWeight."""
    plain = copied.detach()
    result = plain.as_subclass(PackedWeight)
    result.plain, result.weights = plain, tuple(weights)
    return result


class _Copied(torch.autograd.Function):
    """The copy as a function of the weights, whose derivative is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(copied, *weights):
        return copied.view_as(copied)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "FusedRMSNormQKV: qkv_weight requires grad, but prepack=True computes with a copy of it, which carries no "
            "gradients; train a layer without prepack, or detach() the weight"
        )


def unpacked(weight):
    """Where `weight` is a PackedWeight: an ordinary tensor, through which no gradient passes unnoticed."""
    if not isinstance(weight, PackedWeight):
        return weight
    if torch.is_grad_enabled() and any(each.requires_grad for each in weight.weights):
        return _Copied.apply(weight.plain, *weight.weights)
    return weight.plain
