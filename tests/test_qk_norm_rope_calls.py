"""qk_norm_rope as it is called: by torch, in its graphs and with gradients, by JAX, and what is refused."""

import functools

import numpy as np
import pytest
from cases import assert_same_bits, random
from torch_calls import largest_allocation

import minivllm
from minivllm.testing import reference

# ---- torch and JAX --------------------------------------------------------------------------------------------------


def torch_tensors(torch, device="cpu", cache=True, dtype="float32"):
    """q, k and v are views of one packed buffer."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))  # noqa: E731
    packed = draw(2, 3, 8 * 32).unflatten(-1, (8, 32))
    q, k, v = packed.split([4, 2, 2], -2)
    given = {"q": q, "k": k, "cos": draw(3, 24), "sin": draw(1, 1, 24)}
    given |= {"q_norm_weight": draw(32), "k_norm_weight": draw(32)}
    if cache:
        slots = torch.tensor([[4, -1, 7], [2, 30, 0]], device=device)
        given |= {"v": v, "key_cache": draw(3, 2, 5, 32), "value_cache": draw(3, 2, 5, 32), "slots": slots}
    return given


def in_torch(q, k, cos=None, sin=None, *, q_norm_weight=None, k_norm_weight=None, eps=1e-6, interleaved=False):
    """The formula, in torch's own expressions."""
    import torch

    results = []
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        n = x if weight is None else torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
        if cos is not None:
            n = reference.rotary(n, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved=interleaved)
        results.append(n)
    return results


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("without", [(), ("cos", "sin"), ("q_norm_weight",), ("q_norm_weight", "k_norm_weight")])
def test_gradients(device, torch, interleaved, without):
    given = torch_tensors(torch, device, cache=False)
    given = {name: t.clone().requires_grad_() for name, t in given.items() if name not in without}
    results = [function(**given, interleaved=interleaved) for function in (minivllm.qk_norm_rope, in_torch)]
    generator = torch.Generator().manual_seed(2)
    towards = [torch.randn(x.shape, generator=generator).to(device) for x in results[0]]
    gradients = [torch.autograd.grad(result, list(given.values()), towards) for result in results]
    for name, got, expected in zip(given, *gradients):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_with_a_cache_there_are_no_gradients(torch):
    given = torch_tensors(torch)
    for name in ("q", "v", "q_norm_weight", "key_cache"):
        tensors = given | {name: given[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"qk_norm_rope: {name} requires grad .* under torch.no_grad"):
            minivllm.qk_norm_rope(**tensors)
        with torch.no_grad():
            minivllm.qk_norm_rope(**tensors)


@pytest.mark.parametrize("one_base", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_compiled(device, torch, cache, one_base):
    """As eager, and without a copy of the caches, also where they are slices of one tensor that the graph is given."""
    from torch._inductor.utils import run_and_get_code

    given = torch_tensors(torch, device, cache)
    copies = {name: t.clone() for name, t in given.items()}
    wanted = minivllm.qk_norm_rope(**copies)
    names = ("key_cache", "value_cache") if cache else ()
    caches = [given.pop(name) for name in names]
    if cache and one_base:
        caches = torch.stack(caches)
    torch.compiler.reset()

    def step(given, caches):
        return minivllm.qk_norm_rope(**given, **{name: caches[i] for i, name in enumerate(names)})

    results, code = run_and_get_code(torch.compile(step, fullgraph=True), given, caches)
    for got, expected in zip(results, wanted):
        assert torch.equal(got, expected)
    for name, written in (given | dict(zip(names, caches))).items():
        assert torch.equal(written, copies[name]), name
    assert largest_allocation(code) < 960


def test_compiled_gradients(torch):
    given = {name: t.clone().requires_grad_() for name, t in torch_tensors(torch, cache=False).items()}
    gradients = []
    for function in (minivllm.qk_norm_rope, torch.compile(minivllm.qk_norm_rope, fullgraph=True, backend="aot_eager")):
        loss = sum((out * out).sum() for out in function(**given))
        gradients.append(torch.autograd.grad(loss, list(given.values())))
    for name, got, expected in zip(given, *gradients):
        torch.testing.assert_close(got, expected, msg=name)


def test_torch_knows_what_is_written(device, torch):
    given = torch_tensors(torch, device)
    before = {name: t._version for name, t in given.items()}
    minivllm.qk_norm_rope(**given)
    assert {name for name, t in given.items() if t._version != before[name]} == {"key_cache", "value_cache"}
    q, k = (given[name].clone() for name in "qk")
    wanted = minivllm.qk_norm_rope(**given)
    results = minivllm.qk_norm_rope(**(given | {"q": q, "k": k}), out_q=q, out_k=k)
    assert results[0] is q and results[1] is k and q._version == k._version == 1
    assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    given = arguments(slots=np.array([[4, -1, 7], [2, 30, 0]], np.int32))
    rng = random("jax")
    for name, array in given.items():
        if name != "slots":
            array[...] = rng.standard_normal(array.shape)
    arrays = {name: jax.numpy.array(array) for name, array in given.items()}
    results = ops.qk_norm_rope(**arrays)
    assert_same_bits(np.asarray(arrays["key_cache"]), given["key_cache"], "an input")
    wanted = (*minivllm.qk_norm_rope(**given), given["key_cache"], given["value_cache"])
    assert len(results) == 4
    for got, expected in zip(results, wanted):
        assert_same_bits(np.asarray(got), expected)
    without = {name: x for name, x in arrays.items() if name not in ("v", "key_cache", "value_cache", "slots")}
    for interleaved in (False, True):
        function = functools.partial(ops.qk_norm_rope, interleaved=interleaved)
        for got, expected in zip(function(**without), minivllm.qk_norm_rope(
            **{name: given[name] for name in without}, interleaved=interleaved
        )):  # fmt: skip
            assert_same_bits(np.asarray(got), expected)

        def loss(arrays, function=function):
            return sum((out**2).sum() for out in function(**arrays))

        gradients = jax.grad(loss)(without)
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(given[name].copy()).requires_grad_() for name in without}
        sum((out**2).sum() for out in in_torch(**tensors, interleaved=interleaved)).backward()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(np.asarray(gradients[name]), tensor.grad.numpy(), rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda q: ops.qk_norm_rope(**(without | {"q": q})))(jax.numpy.stack([arrays["q"]] * 2))


# ---- what is refused ------------------------------------------------------------------------------------------------


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def arguments(**changes):
    arrays = {
        "q": ones(2, 3, 4, 32), "k": ones(2, 3, 2, 32), "v": ones(2, 3, 2, 32), "cos": ones(2, 3, 24),
        "sin": ones(2, 3, 24), "q_norm_weight": ones(32), "k_norm_weight": ones(32),
        "key_cache": ones(3, 2, 5, 32), "value_cache": ones(3, 2, 5, 32),
        "slots": np.arange(6, dtype=np.int64).reshape(2, 3),
    }  # fmt: skip
    return arrays | changes


BASE = ones(2, 3, 8, 32)
REFUSED = [
    ({"q": ones(32)}, ValueError, r"q has shape \[32\], expected \[\.\.\., heads, head_dim\]"),
    ({"q": ones(2, 3, 0, 32)}, ValueError, r"q has shape .*, a head and a column at least"),
    ({"q": ones(2, 3, 4, 1026)}, ValueError, r"q has heads of 1026 columns, expected 1024 at most"),
    ({"q": ones(2, 3, 4, 64)[..., ::2]}, ValueError, r"q must be contiguous in its last dimension, got stride 2"),
    ({"q": ones(2, 3, 4, 32, dtype=np.float64)}, TypeError, r"q has dtype float64, expected float32"),
    ({"k": ones(2, 4, 2, 32)}, ValueError, r"k has shape .*, expected \[\*\[2, 3\], kv_heads, 32\]"),
    ({"k": ones(2, 3, 2, 16)}, ValueError, r"k has shape .*, expected \[\*\[2, 3\], kv_heads, 32\]"),
    ({"k": ones(2, 3, 2, 32, dtype=np.float16)}, TypeError, r"k is float16, expected float32 \(the dtype of q\)"),
    ({"v": ones(2, 3, 3, 32)}, ValueError, r"v has shape .*, expected \[\*\[2, 3\], k's heads, 32\]"),
    ({"sin": None}, ValueError, r"cos was given without sin"),
    ({"cos": None}, ValueError, r"sin was given without cos"),
    ({"cos": ones(2, 3, 34)}, ValueError, r"cos has shape .*, expected .* R even and at most 32"),
    ({"cos": ones(2, 3, 23)}, ValueError, r"cos has shape .*, expected .* R even and at most 32"),
    ({"cos": ones(3, 3, 24)}, ValueError, r"cos has shape \[3, 3, 24\], .* broadcast to \[2, 3\] \(q's tokens\)"),
    ({"cos": ones(2, 24)}, ValueError, r"cos has shape \[2, 24\], .* broadcast to \[2, 3\] \(q's tokens\)"),
    ({"sin": ones(2, 3, 22)}, ValueError, r"sin has rows of 22 in float32, expected 24"),
    ({"q_norm_weight": ones(31)}, ValueError, r"q_norm_weight has 31 elements, expected 32 \(= head_dim\)"),
    ({"k_norm_weight": ones(32, dtype=np.float16)}, TypeError, r"k_norm_weight is float16, expected float32"),
    ({"slots": None}, ValueError, r"value_cache was given without slots, but a cache needs v, key_cache"),
    ({"v": None}, ValueError, r"slots was given without v, but a cache needs v, key_cache, value_cache and slots"),
    ({"value_cache": None}, ValueError, r"slots was given without value_cache"),
    ({"slots": np.zeros(6, np.int64)}, ValueError, r"slots has shape \[6\], expected \[2, 3\]"),
    ({"slots": ones(2, 3)}, TypeError, r"slots has dtype float32, expected int32 or int64"),
    ({"key_cache": ones(3, 3, 5, 32)}, ValueError, r"key_cache has shape .*, expected \[3, 2, 5, 32\]"),
    ({"key_cache": ones(3, 5, 2, 32)}, ValueError, r"key_cache has shape .*, expected \[3, 2, 2, 32\] \(sequences"),
    ({"key_cache": ones(3, 2, 0, 32), "value_cache": ones(3, 2, 0, 32)}, ValueError, r"expected a row at least"),
    ({"value_cache": ones(4, 2, 5, 32)}, ValueError, r"value_cache has shape .* \(the shape of key_cache\)"),
    ({"key_cache": ones(3, 2, 5, 32, dtype=np.float16)}, TypeError, r"key_cache is float16, expected float32"),
    ({"key_cache": np.broadcast_to(ones(1, 2, 5, 32), (3, 2, 5, 32))}, ValueError, r"key_cache is read-only"),
    ({"cache_layout": "BHSD"}, ValueError, r"cache_layout .*\"NHD\" or \"HND\""),
    ({"eps": -1.0}, ValueError, r"eps is -1"),
    ({"rounding": "none"}, ValueError, r"rounding"),
    ({"kernel": "nope"}, ValueError, r"kernel"),
    ({"out_q": ones(2, 3, 4, 16)}, ValueError, r"out_q has shape .*, expected \[2, 3, 4, 32\]"),
    ({"out_k": ones(2, 3, 2, 32, dtype=np.float16)}, TypeError, r"out_k is float16, expected float32"),
    ({"q": BASE[:, :, :4], "out_q": BASE[:, :, 1:5]}, ValueError, r"out_q overlaps q in part .*pass memory of its own"),
    ({"q": BASE[:, :, :4], "out_k": BASE[:, :, 2:4]}, ValueError, r"out_k overlaps q; pass memory of its own"),
    ({"out_q": BASE[:, :, :4], "out_k": BASE[:, :, 3:5]}, ValueError, r"out_k overlaps out_q"),
    ({"v": BASE[:, :, :2], "out_k": BASE[:, :, :2]}, ValueError, r"out_k overlaps v"),
]


@pytest.mark.parametrize("changes, exception, message", REFUSED)
def test_refused(changes, exception, message):
    with pytest.raises(exception, match=f"^qk_norm_rope: .*{message}"):
        minivllm.qk_norm_rope(**arguments(**changes))


def test_overlapping_caches_are_refused():
    cache = ones(4, 2, 5, 32)
    with pytest.raises(ValueError, match="value_cache overlaps key_cache"):
        minivllm.qk_norm_rope(**arguments(key_cache=cache[:3], value_cache=cache[1:]))
    both = ones(2, 3, 2, 5, 32)
    minivllm.qk_norm_rope(**arguments(key_cache=both[0], value_cache=both[1]))
    with pytest.raises(ValueError, match="cache_layout was given without a key_cache"):
        minivllm.qk_norm_rope(ones(1, 1, 8), ones(1, 1, 8), cache_layout="NHD")


def test_no_cache_without_pages(device, framework):
    """A cache of no pages: every slot is outside of it."""
    given = arguments(key_cache=ones(0, 5, 2, 32), value_cache=ones(0, 5, 2, 32))
    slots = framework.integers(given.pop("slots"), True)
    tensors = {name: framework.tensor(x, "f32") for name, x in given.items()}
    minivllm.qk_norm_rope(**tensors, slots=slots, cache_layout="NHD")


@pytest.mark.gpu
def test_in_a_graph(cuda_torch):
    """Captured once, replayed with other slots: as eager calls on copies."""
    torch = cuda_torch
    given = torch_tensors(torch, "cuda", dtype="bfloat16")
    minivllm.qk_norm_rope(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = minivllm.qk_norm_rope(**given)
    for seed in range(3):
        torch.manual_seed(seed)
        given["slots"].copy_(torch.randperm(15)[:6].reshape(2, 3))
        copies = {name: t.clone() for name, t in given.items()}
        graph.replay()
        for got, expected in zip(results, minivllm.qk_norm_rope(**copies)):
            assert torch.equal(got, expected)
        assert torch.equal(given["key_cache"], copies["key_cache"])
        assert torch.equal(given["value_cache"], copies["value_cache"])
