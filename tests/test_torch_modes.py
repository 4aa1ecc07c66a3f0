"""What torch puts around a call: transformations, subclasses, modes, tensors without memory, streams and graphs under
gradients. Right, or an error that says what is not done; never quietly wrong."""

import pytest
from cases import assert_same_bits
from processes import succeeds
from torch_calls import CALLS, FUNCTIONAL, HEADS, KV_HEADS, Inputs, assert_same

import minivllm

TENSORS = ("x", "residual", "norm", "wide", "square", "bias")


def each_tensor(inputs, change):
    """The inputs, with every tensor changed."""
    for name in TENSORS:
        setattr(inputs, name, change(getattr(inputs, name)))
    return inputs


# ---- torch.func -----------------------------------------------------------------------------------------------------


def project(x, norm, weight):
    """q and the normed x, so both kinds of op."""
    q, _, _, total = minivllm.rms_norm_qkv(x, norm, weight, HEADS, KV_HEADS, residual=x)
    return q.flatten(-2), minivllm.rms_norm(total, norm)


@pytest.mark.parametrize("dims", [(0, None, None), (2, None, None), (None, 1, None), (None, None, 0), (1, 0, 1)])
def test_vmap(torch, device, dims):
    """Over tokens, weights, or both, along any dimension."""
    i = Inputs(device)
    batch = 4
    given = []
    for tensor, dim in zip((i.x, i.norm, i.wide), dims):
        each = torch.stack([tensor * (1 + k / 8) for k in range(batch)])
        given.append(tensor if dim is None else each.movedim(0, dim))
    got = torch.vmap(project, in_dims=dims)(*given)
    for k in range(batch):
        one = [tensor if dim is None else tensor.select(dim, k).contiguous() for tensor, dim in zip(given, dims)]
        for a, b in zip(got, project(*one)):
            assert torch.allclose(a[k], b, rtol=1e-5, atol=1e-5)  # another number of rows may have another kernel


def test_a_residual_for_all(torch, device):
    i = Inputs(device)
    got = torch.vmap(lambda x: minivllm.add_rms_norm(x, i.residual[0], i.norm))(i.x)
    for a, b in zip(got, minivllm.add_rms_norm(i.x, i.residual[:1].expand_as(i.x).contiguous(), i.norm)):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 1, None), (None, None, 0), (0, 0, 2)])
def test_vmap_over_nothing(torch, device, dims):
    i = Inputs(device)
    given = [
        tensor if dim is None else tensor.unsqueeze(dim).narrow(dim, 0, 0)
        for tensor, dim in zip((i.x, i.norm, i.wide), dims)
    ]
    got = torch.vmap(project, in_dims=dims)(*given)
    assert [tensor.shape for tensor in got] == [(0, *tensor.shape) for tensor in project(i.x, i.norm, i.wide)]
    options = {"weight_layout": "in_out"}
    square = torch.vmap(lambda weight: minivllm.rms_norm_qkv(i.x, i.norm, weight.t(), HEADS, KV_HEADS, **options)[1])
    assert square(i.square.expand(0, -1, -1)).shape == (0, 3, KV_HEADS, 8)


def test_gradients_per_sample(torch, device):
    """torch.func.grad is torch.autograd.grad, also of every sample at once."""
    i = Inputs(device)

    def loss(norm, weight, x):
        return sum((part**2).sum() for part in project(x, norm, weight))

    together = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(i.norm, i.wide, i.x)
    i.norm.requires_grad_(), i.wide.requires_grad_()
    for k in range(len(i.x)):
        alone = torch.autograd.grad(loss(i.norm, i.wide, i.x[k]), [i.norm, i.wide])
        for a, b in zip(together, alone):
            assert torch.allclose(a[k], b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_no_writing_under_vmap(torch, device):
    i = Inputs(device)
    with pytest.raises(RuntimeError, match="fused_add_rms_norm"):
        torch.vmap(lambda x, r: minivllm.fused_add_rms_norm(x, r, i.norm))(i.x.clone(), i.residual.clone())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_forward_mode(torch, device, call):
    from torch.autograd import forward_ad

    i = Inputs(device)
    with forward_ad.dual_level():
        i.x = forward_ad.make_dual(i.x, i.residual)
        with pytest.raises(RuntimeError, match="has no derivatives in forward mode"):
            call(i)
    with pytest.raises(RuntimeError, match="has no derivatives in forward mode"):
        torch.func.jvp(lambda norm: minivllm.rms_norm(i.residual, norm), (i.norm,), (i.norm,))
    assert_same(call(Inputs(device)), call(Inputs(device)))  # the level is left


# ---- tensors without memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_fake_and_meta_tensors(torch, device, call):
    """Shapes, strides, dtype and device of the real results, and no kernel runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, real = FakeTensorMode(), call(Inputs(device, "bf16"))
    fakes, metas = (
        each_tensor(Inputs(device, "bf16"), change) for change in (mode.from_tensor, lambda t: t.to("meta"))
    )
    minivllm.rms_norm(real[0].new_ones(1, 8), real[0].new_ones(8))
    before = minivllm.last_kernel()
    results = [(call(fakes), device), (call(metas), "meta")]
    with mode:
        results.append((call(fakes), device))
    assert minivllm.last_kernel() == before
    for got, where in results:
        for a, b in zip(got, real, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device.type) == (b.shape, b.stride(), b.dtype, where)


# ---- subclasses and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_subclass_with_torch_function(torch, device, call):
    """torch's default: results are of the subclass. A class that changes results has its say."""

    class Named(torch.Tensor):
        pass

    class Negated(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            result = super().__torch_function__(function, types, arguments, keywords or {})
            return -result if function is torch.ops.minivllm.rms_norm.default else result

    expected = call(Inputs(device))
    got = call(each_tensor(Inputs(device), lambda tensor: tensor.as_subclass(Named)))
    assert all(type(tensor) is Named for tensor in got)
    assert_same([tensor.as_subclass(torch.Tensor) for tensor in got], expected)
    i = Inputs(device)
    plain = minivllm.rms_norm(i.x, i.norm)
    assert_same_bits(minivllm.rms_norm(i.x.as_subclass(Negated), i.norm).as_subclass(torch.Tensor), -plain)


def wrapper_class(torch, serves):
    """A tensor that holds another one, as DTensor does: it runs the ops that it knows on that, and refuses others."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
            )

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
            from torch.utils._pytree import tree_map_only

            if not serves and function.namespace == "minivllm":
                raise NotImplementedError(f"{function} has no rule for {cls.__name__}")
            seen.append(function)
            inner = tree_map_only(cls, lambda tensor: tensor.inner, (arguments, keywords or {}))
            result = function(*inner[0], **inner[1])
            if function._schema.is_mutable:
                return arguments[0]
            return tree_map_only(torch.Tensor, cls, result)

    seen = Wrapper.seen = []
    return Wrapper


@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_a_subclass_with_torch_dispatch(torch, device, call):
    """It sees the registered op, and computes what it makes of it."""
    Wrapper = wrapper_class(torch, serves=True)
    got = call(each_tensor(Inputs(device), Wrapper))
    assert [function for function in Wrapper.seen if function.namespace == "minivllm"]
    assert_same([tensor.inner for tensor in got], call(Inputs(device)))
    with pytest.raises(NotImplementedError, match=r"minivllm\.\w+.default has no rule for Wrapper"):
        call(each_tensor(Inputs(device), wrapper_class(torch, serves=False)))
    with pytest.raises(TypeError, match=r"FusedRMSNormQKV: norm_weight is a .*Wrapper, which is no plain memory"):
        minivllm.FusedRMSNormQKV(
            norm_weight=Wrapper(torch.ones(8)), qkv_weight=torch.ones(24, 8), num_heads=1, num_kv_heads=1
        )


def test_dispatch_modes_see_the_ops(torch, device):
    """Those that count, log or trace; eager calls without one bypass the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    for name, call in CALLS.items():
        with Log() as outer, Log() as inner:
            got = call(Inputs(device))
        assert_same(got, call(Inputs(device)))
        assert any("minivllm" in seen for seen in inner.seen) and outer.seen == inner.seen, name


def test_tracers_see_the_ops(torch, device):
    """make_fx and torch.jit.trace: the trace computes, on other values, what the call does."""
    from torch.fx.experimental.proxy_tensor import make_fx

    i, more = Inputs(device), Inputs(device)
    more.x = more.x * 2 - 1

    def call(x):
        q, k, v = minivllm.rms_norm_qkv(x, i.norm, i.wide, HEADS, KV_HEADS)
        return q, minivllm.rms_norm(x, i.norm)

    for trace in (make_fx(call)(i.x), torch.jit.trace(call, i.x)):
        assert_same(trace(more.x), call(more.x))


def test_inference_mode(torch, device):
    for call in CALLS.values():
        expected = call(Inputs(device))
        with torch.inference_mode():
            got = call(Inputs(device))
        assert_same(got, expected)
        assert all(tensor.is_inference() for tensor in got)
    i = Inputs(device)
    weight = torch.nn.Parameter(i.norm)
    with torch.inference_mode():
        x = i.x.clone()
    with pytest.raises(RuntimeError, match="[Ii]nference tensors cannot be saved for backward"):
        minivllm.rms_norm(x, weight)


# ---- under gradients, on a GPU --------------------------------------------------------------------------------------------


@pytest.fixture
def step(cuda_torch):
    """(inputs, a training step: x -> outputs and gradients)."""
    torch, i = cuda_torch, Inputs("cuda")
    weights = [i.norm.requires_grad_(), i.wide.requires_grad_()]

    def run(x):
        outputs = project(x, *weights)
        return *outputs, *torch.autograd.grad([(output**2).sum() for output in outputs], weights)

    return i, run


@pytest.mark.gpu
def test_gradients_on_a_side_stream(cuda_torch, step):
    """x is filled late there: a launch on any other stream would read what was there before."""
    torch, (i, run), side = cuda_torch, step, cuda_torch.cuda.Stream()
    expected = [tensor.clone() for tensor in run(i.x)]
    x = torch.zeros_like(i.x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(5_000_000)
        x.copy_(i.x)
        got = run(x)
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_training_step_in_a_graph(cuda_torch, step):
    torch, (i, run) = cuda_torch, step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # autograd's own warm-up
        run(i.x)
    torch.cuda.synchronize()
    graph, x = torch.cuda.CUDAGraph(), i.x.clone()
    with torch.cuda.graph(graph, stream=side):
        captured = run(x)
    for factor in (2.0, -0.5):
        x.mul_(factor)
        graph.replay()
        for a, b in zip([tensor.clone() for tensor in captured], run(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gradients_on_another_gpu_than_the_current_one(cuda_torch, step):
    torch, (i, run) = cuda_torch, step
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = run(i.x)
    there = [tensor.detach().to("cuda:1").requires_grad_() for tensor in (i.x, i.norm, i.wide)]
    outputs = project(*there)
    got = *outputs, *torch.autograd.grad([(output**2).sum() for output in outputs], there[1:])
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())
    graph = torch.compile(project, fullgraph=True, backend="aot_eager")
    for a, b in zip(graph(*there), expected):
        assert torch.equal(a.cpu(), b.cpu())


COLD = """
    import torch, minivllm
    torch.manual_seed(0)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.nn.Parameter(torch.ones_like(x[0]))
    matrix = torch.nn.Parameter(0.05 * torch.randn(5 * 64, 256, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()
    def call():  # through the registered ops, as a compiled graph calls them
        ops = torch.ops.minivllm
        norm = dict(eps=1e-6, rounding="hf", weight_offset=0.0, kernel=None)
        total = ops.add_rms_norm(x=x, residual=x, weight=weight, **norm)[1]
        return minivllm.rms_norm(total, weight), ops.rms_norm_qkv(
            x=x, norm_weight=weight, qkv_weight=[matrix], bias=[], num_heads=3, num_kv_heads=1, head_dim=None,
            weight_layout="auto", batch_invariant=False, allow_tf32=False, static_weights=True, **norm)
    import minivllm.torch
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):  # the process's first launches: nothing was warmed up
        captured = call()
    x.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        for a, b in zip(captured, call()):
            assert torch.equal(a, b)
"""


@pytest.mark.gpu
def test_cold_capture_of_the_registered_ops(cuda_torch):
    succeeds(COLD)


@pytest.mark.gpu
def test_pinned_memory_under_gradients(cuda_torch):
    x = cuda_torch.randn(2, 8).pin_memory().requires_grad_()
    minivllm.rms_norm(x, cuda_torch.ones(8)).sum().backward()
    assert x.grad.device.type == "cpu"


def test_functionalize(torch):
    x, weight, matrix = torch.randn(3, 8), torch.rand(8), torch.randn(16, 8)
    got = torch.func.functionalize(lambda a: minivllm.rms_norm(a, weight))(x)
    assert torch.equal(got, minivllm.rms_norm(x, weight))
    parts = torch.func.functionalize(lambda a: minivllm.rms_norm_qkv(a, weight, matrix, 2, 1))(x)
    for part, expected in zip(parts, minivllm.rms_norm_qkv(x, weight, matrix, 2, 1), strict=True):
        assert torch.equal(part, expected)
