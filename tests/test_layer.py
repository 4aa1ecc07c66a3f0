"""The layer object: checked once, cheap to call, and no copy of the weights unless asked for."""

import copy
import gc
import io
import pickle
import threading
import weakref

import numpy as np
import pytest
from cases import assert_same_bits, normal
from checks import IS_IN_OUT, QKV, WEIGHTS, weight_data
from dlpack import Exporter
from frameworks import TORCH_CPU

import minivllm
from minivllm.testing.reference import to_float64


def layer_of(framework, case, weights="packed", **options):
    """A layer, the function with the same arguments, and some x."""
    norm_weight, weight, bias = weight_data(case)
    arguments = {
        "norm_weight": framework.tensor(norm_weight, case.dtype),
        "qkv_weight": WEIGHTS[weights](framework, weight, case.dtype, case.sizes),
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "bias": framework.tensor(bias, case.dtype) if case.bias else None,
        "weight_layout": "in_out" if weights in IS_IN_OUT else "out_in",
        **options,
    }
    layer = minivllm.FusedRMSNormQKV(**arguments)
    arguments.pop("prepack", None)
    x = framework.tensor(normal((5, case.hidden), case.dtype, "x"), case.dtype)
    return layer, lambda x, **more: minivllm.rms_norm_qkv(x, **arguments, **more), x


def assert_all_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert tuple(a.shape) == tuple(b.shape)
        assert_same_bits(a, b)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("prepack", [False, True], ids=["as given", "prepacked"])
def test_a_layer_is_the_function(device, framework, weights, prepack):
    for dtype in ("f32", "f16"):
        case = QKV((5,), 40, 3, 1, 8, dtype, bias=True)
        layer, function, x = layer_of(
            framework, case, weights, prepack=prepack, eps=1e-5, rounding="fp32", weight_offset=0.5
        )
        if prepack:  # another layout may have another sum order
            for a, b in zip(layer(x), function(x)):
                step = {"f32": 1e-6, "f16": 2e-3}[dtype]
                assert np.abs(to_float64(a) - to_float64(b)).max() < step * np.abs(to_float64(b)).max()
        else:
            assert_all_same(layer(x), function(x))
        residual = framework.tensor(normal((5, 40), dtype, "residual"), dtype)
        out, sums = framework.full((5, 40), 0.0, dtype), framework.full((5, 40), 0.0, dtype)
        q, k, v, total = layer(x, residual=residual, out=out, residual_out=sums)
        assert total is sums
        framework.synchronize()
        assert_same_bits(out, np.concatenate([to_float64(part).reshape(5, -1) for part in (q, k, v)], -1))


def test_it_sees_weights_that_change(device, framework):
    case = QKV((5,), 40, 3, 1, 8, "f32")
    layer, function, x = layer_of(framework, case)
    before = to_float64(layer(x)[0])
    layer.qkv_weight[...] = layer.qkv_weight * 2
    layer.norm_weight[...] = layer.norm_weight * 0.5
    assert_all_same(layer(x), function(x))
    layer.norm_weight[...] = layer.norm_weight * 2
    assert_same_bits(layer(x)[0], 2 * before)


def vouching(torch, **options):
    """A layer of plain torch tensors, and what a call of it on a GPU would tell the kernels: are the weights static?"""
    norm, weight, bias = torch.ones(16), torch.randn(24, 16), torch.randn(24)
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=norm, qkv_weight=weight, bias=bias, num_heads=1, num_kv_heads=1, **options
    )
    return layer, layer._vouches


def test_a_layer_vouches_while_the_counters_of_its_weights_stand_still(torch):
    layer, vouches = vouching(torch)
    assert [vouches(), vouches(), vouches()] == [False, True, True]
    for tensor in (layer.norm_weight, layer.qkv_weight, layer.bias):
        tensor.mul_(2)
        assert [vouches(), vouches()] == [False, True]
        minivllm.rms_norm(torch.ones_like(tensor), torch.ones(tensor.shape[-1]), out=tensor)
        assert [vouches(), vouches()] == [False, True]
    layer.qkv_weight.data = torch.randn(24, 16)
    assert [vouches(), vouches()] == [False, True]
    for name in ("norm_weight", "qkv_weight", "bias"):
        setattr(layer, name, getattr(layer, name).clone())
        assert [vouches(), vouches()] == [False, True]
        setattr(layer, name, getattr(layer, name))  # another tensor may have the address of one that is gone
        assert [vouches(), vouches()] == [False, True]
    copied = copy.copy(layer)
    assert [copied._vouches(), copied._vouches()] == [False, True]


def test_a_prepacked_layer_vouches_until_it_is_refreshed(torch):
    layer, vouches = vouching(torch, prepack=True)
    assert [vouches(), vouches()] == [False, True]
    layer.refresh()
    assert [vouches(), vouches()] == [False, True]


def test_a_layer_does_not_vouch_where_nothing_counts(torch):
    with torch.inference_mode():
        weight = torch.randn(24, 16)
    layer = minivllm.FusedRMSNormQKV(norm_weight=torch.ones(16), qkv_weight=weight, num_heads=1, num_kv_heads=1)
    assert [layer._vouches() for _ in range(3)] == [False] * 3
    arrays = minivllm.FusedRMSNormQKV(
        norm_weight=np.ones(16, np.float32), qkv_weight=np.ones((24, 16), np.float32), num_heads=1, num_kv_heads=1
    )
    assert [arrays._vouches() for _ in range(3)] == [False] * 3


@pytest.mark.parametrize("told", [True, False])
def test_a_layer_vouches_as_it_is_told(torch, told):
    layer, vouches = vouching(torch, static_weights=told)
    assert [vouches(), vouches()] == [told, told]
    layer.qkv_weight.mul_(2)
    assert [vouches(), vouches()] == [told, told]
    with pytest.raises(AttributeError, match="static_weights was read when the layer was made"):
        layer.static_weights = None
    with pytest.raises(TypeError, match="static_weights must be True or False"):
        vouching(torch, static_weights=1)


def test_it_reads_the_pointers_at_each_call(torch):
    """A Parameter whose storage is replaced, as loading a checkpoint does."""
    linear, norm = torch.nn.Linear(16, 24, bias=False), torch.nn.Parameter(torch.ones(16))
    x = torch.randn(3, 16)
    with torch.no_grad():
        layer = minivllm.FusedRMSNormQKV(norm_weight=norm, qkv_weight=linear.weight, num_heads=1, num_kv_heads=1)
        linear.weight.data = torch.randn(24, 16)
        assert_all_same(layer(x), minivllm.rms_norm_qkv(x, norm, linear.weight, 1, 1))


def test_prepack_copies_once_and_refresh_renews(device, framework):
    case = QKV((5,), 40, 3, 1, 8, "f32")
    plain, _, x = layer_of(framework, case, "in_out")
    layer, _, _ = layer_of(framework, case, "in_out", prepack=True)
    assert layer.prepacked_bytes == 40 * 40 * 4 and plain.prepacked_bytes == 0
    before = to_float64(layer(x)[1])
    layer.qkv_weight[...] = layer.qkv_weight * 2
    assert_same_bits(layer(x)[1], before, "prepacked weights before refresh()")
    layer.refresh()
    assert_same_bits(layer(x)[1], 2 * before, "prepacked weights after refresh()")
    plain.refresh()  # nothing to renew, and no error


def test_no_copy_of_the_weights_is_made():
    weight = np.ones((40, 64), np.float32)
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=np.ones(64, np.float32), qkv_weight=weight.T, num_heads=3, num_kv_heads=1
    )
    x = np.ones((2, 64), np.float32)
    assert layer.qkv_weight.base is weight
    assert np.allclose(layer(x)[0], 64)
    weight[...] = 0
    assert (layer(x)[0] == 0).all()


def test_what_it_refuses_at_construction(device, framework):
    good = {
        "norm_weight": framework.full((64,), 1.0, "f32"),
        "qkv_weight": framework.full((40, 64), 1.0, "f32"),
        "num_heads": 3,
        "num_kv_heads": 1,
    }
    for spoilt, exception, message in (
        (
            {"norm_weight": framework.full((60,), 1.0, "f32")},
            ValueError,
            r"FusedRMSNormQKV: (qkv_weight has shape \[40, 64\]|norm_weight has 60)",
        ),
        ({"num_heads": 4}, ValueError, r"FusedRMSNormQKV: qkv_weight has 40 outputs, expected a multiple of 6"),
        ({"num_kv_heads": 0}, ValueError, r"num_kv_heads is 0"),
        ({"head_dim": 16}, ValueError, r"head_dim is 16, expected 8"),
        ({"rounding": "bf16"}, ValueError, r"rounding"),
        ({"eps": -1.0}, ValueError, r"eps is -1"),
        ({"bias": framework.full((39,), 1.0, "f32")}, ValueError, r"bias has 39 elements"),
        ({"qkv_weight": [1.0]}, (TypeError, ValueError), r"qkv_weight"),
        ({"norm_weight": None}, TypeError, r"norm_weight"),
    ):
        with pytest.raises(exception, match=message):
            minivllm.FusedRMSNormQKV(**(good | spoilt))
    with pytest.raises(TypeError):
        minivllm.FusedRMSNormQKV(good["norm_weight"], good["qkv_weight"], 3, 1)
    layer = minivllm.FusedRMSNormQKV(**good)
    with pytest.raises(ValueError, match=r"^FusedRMSNormQKV: x has hidden size 63, expected 64"):
        layer(framework.full((2, 63), 1.0, "f32"))
    with pytest.raises(TypeError):
        layer(framework.full((2, 64), 1.0, "f32"), framework.full((2, 64), 1.0, "f32"))


def test_it_lives_in_a_module(torch):
    """With its weights in a torch module, in the module's place."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.qkv = torch.nn.RMSNorm(32, eps=1e-6), torch.nn.Linear(32, 40)
            self.fused = minivllm.FusedRMSNormQKV(
                norm_weight=self.norm.weight,
                qkv_weight=self.qkv.weight,
                bias=self.qkv.bias,
                num_heads=3,
                num_kv_heads=1,
            )

    with torch.no_grad():
        module = Attention()
        x = torch.randn(4, 32)
        pair = module.qkv(module.norm(x))
        fused = torch.cat([part.flatten(1) for part in module.fused(x)], 1)
    assert TORCH_CPU.is_mine(fused) and torch.allclose(fused, pair, atol=1e-5)


def test_its_numbers_are_fixed_and_its_weights_are_not(device, framework):
    weights = {
        name: framework.full(shape, 0.5, "f32") for name, shape in (("norm_weight", (64,)), ("qkv_weight", (40, 64)))
    }
    layer = minivllm.FusedRMSNormQKV(**weights, num_heads=3, num_kv_heads=1)
    x = framework.full((2, 64), 1.0, "f32")
    for name, value in (("eps", 1.0), ("num_heads", 1), ("rounding", "fp32"), ("weight_offset", 1.0), ("head_dim", 4)):
        with pytest.raises(AttributeError, match=f"{name} was read when the layer was made"):
            setattr(layer, name, value)
    layer.norm_weight = framework.full((64,), 2.0, "f32")
    assert_same_bits(layer(x)[0], minivllm.rms_norm_qkv(x, layer.norm_weight, layer.qkv_weight, 3, 1)[0])
    assert_same_bits(copy.deepcopy(layer)(x)[0], layer(x)[0])


def small_layer(cls=minivllm.FusedRMSNormQKV):
    weights = {"norm_weight": np.ones(64, np.float32), "qkv_weight": np.ones((40, 64), np.float32)}
    return cls(**weights, num_heads=3, num_kv_heads=1)


def test_it_is_copied_pickled_and_collected():
    layer, x = small_layer(), np.ones((2, 64), np.float32)
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is minivllm.FusedRMSNormQKV
        assert_all_same(twin(x), layer(x))
    layer.itself, gone = layer, weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_x_of_another_width_is_to_blame(torch):
    """Not norm_weight, which the caller does not see; with gradients and without."""
    norm_weight = torch.nn.Parameter(torch.ones(64))
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=norm_weight, qkv_weight=torch.ones(40, 64), num_heads=3, num_kv_heads=1
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"^FusedRMSNormQKV: x has hidden size 60, "):
            layer(torch.ones(2, 60))


def test_its_weights_may_be_replaced_while_it_is_called():
    """By another thread: a call sees the old one or the new one. Only Python without a GIL interleaves them everywhere."""
    layer, x = small_layer(), np.ones((2, 64), np.float32)
    expected = {float(scale * layer(x)[0][0, 0, 0]) for scale in (1, 2)}
    done = threading.Event()

    def replace():
        scale = 1
        while not done.is_set():
            scale = 3 - scale
            layer.norm_weight = np.full(64, scale, np.float32)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = {float(layer(x)[0][0, 0, 0]) for _ in range(2000)}
    finally:
        done.set()
        writer.join()
    assert seen <= expected


@pytest.mark.parametrize("prepack", [False, True])
def test_a_pickle_holds_no_bytes_of_a_c_struct(prepack):
    """Another build may lay it out otherwise."""
    weights = {"norm_weight": np.ones(64, np.float32), "qkv_weight": normal((64, 40), "f32", "w").astype(np.float32)}
    layer = minivllm.FusedRMSNormQKV(
        **weights, num_heads=3, num_kv_heads=1, eps=0.5, rounding="fp32", weight_offset=0.5, prepack=prepack
    )
    x = np.ones((2, 64), np.float32)
    saved = layer.__reduce_ex__(4)[2]
    assert not any(isinstance(value, bytes) for value in saved.values())
    assert set(saved) == set(vars(layer)) - {"_numbers"}
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_all_same(twin(x), layer(x))
        assert twin._numbers == layer._numbers
        assert_all_same(twin.spelled_out(x), layer(x))
        twin.refresh()
        assert_all_same(twin(x), layer(x))


def test_a_layer_is_restored_before_its_weights(torch):
    """As torch.load(..., map_location="meta") does."""
    layer = minivllm.FusedRMSNormQKV(
        norm_weight=torch.ones(64), qkv_weight=torch.randn(40, 64), num_heads=3, num_kv_heads=1
    )
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin = torch.load(file, map_location="meta", weights_only=False)
    assert twin.norm_weight.is_meta
    twin.norm_weight, twin.qkv_weight = layer.norm_weight, layer.qkv_weight
    x = torch.randn(3, 64)
    assert_all_same(twin(x), layer(x))


def test_subclasses():
    class Same(minivllm.FusedRMSNormQKV):
        pass

    class OnlyQ(minivllm.FusedRMSNormQKV):
        def __call__(self, x, **options):
            return super().__call__(x, **options)[0]

    class Elsewhere(minivllm.FusedRMSNormQKV):
        """Its norm weight is not in its own dict."""

        @property
        def norm_weight(self):
            return self.kept[0]

        @norm_weight.setter
        def norm_weight(self, weight):
            self.kept = [weight]

    x, out = np.ones((2, 64), np.float32), np.zeros((2, 40), np.float32)
    expected = small_layer()(x)
    assert_all_same(small_layer(Same)(x), expected)
    assert_all_same(small_layer(Elsewhere)(x), expected)
    assert_all_same(small_layer(Same).__call__(x=x), expected)
    assert_same_bits(small_layer(OnlyQ)(x, out=out), expected[0])
    assert np.allclose(out, 64)
    assert repr(small_layer(OnlyQ)).startswith("OnlyQ(hidden=64, ")


def test_what_a_call_refuses():
    layer, x = small_layer(), np.ones((2, 64), np.float32)
    for call in (layer, layer.__call__):
        for arguments, options, message in (
            ((), {}, r"x is missing"),
            ((x, x), {}, r"takes at most 1 positional argument \(x\), got 2; the others .* by name, such as residual="),
            ((x,), {"x": x}, r"x is given twice"),
            ((x,), {"bias": x}, r"has no argument bias; it takes x, residual, out, residual_out"),
            ((x,), {f"option{i}": x for i in range(30)}, r"takes at most 20 arguments, got 31|has no argument option0"),
        ):
            with pytest.raises(TypeError, match=f"^FusedRMSNormQKV: {message}"):
                call(*arguments, **options)
    del layer.bias
    with pytest.raises(AttributeError, match="bias"):
        layer(x)


def test_prepack_says_what_it_cannot_copy():
    """Its own sentence, where an attribute that is missing, or the truth of an array, would speak of neither."""
    weight, matrix = np.ones(64, np.float32), np.ones((40, 64), np.float32)
    arguments = {"norm_weight": weight, "num_heads": 3, "num_kv_heads": 1}
    for given in (Exporter(matrix), Exporter(matrix.T.copy()), (matrix[:24], Exporter(matrix[24:32]), matrix[32:])):
        with pytest.raises(TypeError, match=r"^FusedRMSNormQKV: prepack=True .* got Exporter; leave prepack away"):
            minivllm.FusedRMSNormQKV(qkv_weight=given, **arguments, prepack=True)
    for value in (None, 1, "no", np.ones(3)):
        with pytest.raises(TypeError, match=r"^FusedRMSNormQKV: prepack must be True or False, got "):
            minivllm.FusedRMSNormQKV(qkv_weight=matrix, **arguments, prepack=value)
