"""decode_attention as it is called: what is refused, and by torch, in its graphs, and by JAX."""

import functools

import numpy as np
import pytest
from cases import assert_same_bits, random
from torch_calls import largest_allocation

import minivllm
from minivllm.testing.reference import to_float64


def arguments(**changes):
    shapes = {"q": (3, 4, 64)} | dict.fromkeys("kv", (3, 2, 64))
    shapes |= dict.fromkeys(("key_cache", "value_cache"), (3, 2, 9, 64))
    arrays = {name: ones(*shape) for name, shape in shapes.items()}
    return arrays | {"positions": np.zeros(3, np.int64)} | changes


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def zeros(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "changes,exception,message",
    [
        ({"q": ones(3, 2, 4, 64)}, ValueError, r"q has shape \[3, 2, 4, 64\], expected \[sequences, heads, head_dim\]"),
        ({"q": ones(3, 5, 64)}, ValueError, r"q has 5 heads, expected a multiple of 2 \(those of k and v\)"),
        ({"q": ones(3, 4, 1025)}, ValueError, r"q has heads of 1025 columns, expected 1024 at most"),
        ({"q": ones(3, 4, 64, dtype=np.float16)}, TypeError, r"k is float32, expected float16 \(the dtype of q\)"),
        ({"k": ones(2, 2, 64)}, ValueError, r"k has shape \[2, 2, 64\], expected \[3, 2, 64\]"),
        ({"v": ones(3, 2, 32)}, ValueError, r"v has shape \[3, 2, 32\], expected \[3, 2, 64\] \(the shape of k\)"),
        ({"key_cache": ones(3, 9, 2, 64)}, ValueError, r"key_cache has shape .*, expected \[3, 2, 2, 64\]"),
        ({"key_cache": ones(2, 2, 9, 64)}, ValueError, r"key_cache has shape .*, expected \[3, 2, 9, 64\]"),
        ({"value_cache": ones(3, 2, 8, 64)}, ValueError, r"value_cache has shape .* \(the shape of key_cache\)"),
        ({"key_cache": ones(3, 2, 9, 64, dtype=np.float16)}, TypeError, r"key_cache is float16, expected float32"),
        ({"key_cache": ones(3, 2, 9, 64, dtype=np.int8)}, TypeError, r"key_cache has dtype int8, expected float32"),
        ({"key_cache": np.broadcast_to(ones(1, 2, 9, 64), (3, 2, 9, 64))}, ValueError, r"key_cache is read-only"),
        ({"positions": zeros(2)}, ValueError, r"positions has shape \[2\], expected \[3\]"),
        ({"positions": ones(3)}, TypeError, r"positions has dtype float32, expected int32 or int64"),
        ({"positions": 3}, TypeError, r"positions must be a tensor"),
        ({"starts": zeros(3, 1)}, ValueError, r"starts has shape \[3, 1\], expected \[3\]"),
        ({"cos": ones(3, 64)}, ValueError, r"cos was given without sin"),
        ({"cos": ones(3, 66), "sin": ones(3, 66)}, ValueError, r"cos has shape \[3, 66\], expected \[3, R\]"),
        ({"cos": ones(3, 63), "sin": ones(3, 63)}, ValueError, r"cos has shape \[3, 63\], expected \[3, R\]"),
        ({"cos": ones(2, 64), "sin": ones(2, 64)}, ValueError, r"cos has shape \[2, 64\], expected \[3, R\]"),
        ({"cos": ones(3, 64), "sin": ones(3, 32)}, ValueError, r"sin has rows of 32 in float32, expected 64"),
        ({"q_norm_weight": ones(32)}, ValueError, r"q_norm_weight has 32 elements, expected 64 \(= head_dim\)"),
        ({"block_table": zeros(3, 2)}, ValueError, r'cache_layout is missing, expected "NHD" or "HND"'),
        ({"block_table": zeros(3, 2, dtype=np.int64), "cache_layout": "HND"}, TypeError, r"block_table is int64"),
        ({"block_table": zeros(2, 2), "cache_layout": "HND"}, ValueError, r"block_table has shape \[2, 2\]"),
        ({"cache_layout": "NHD"}, ValueError, r"cache_layout was given without a block_table"),
        ({"cache_layout": "DHN"}, ValueError, r"cache_layout is 'DHN', expected \"NHD\" or \"HND\""),
        ({"ring": True}, ValueError, r"window is missing .*, expected at most 9: a ring keeps no more rows"),
        ({"ring": True, "window": 10}, ValueError, r"window is 10, expected at most 9"),
        ({"window": 0}, ValueError, r"window is 0, expected at least 1"),
        ({"scale": 0.0}, ValueError, r"scale is 0.0, expected a finite number > 0"),
        ({"soft_cap": float("inf")}, ValueError, r"soft_cap is inf, expected a finite number > 0"),
        ({"eps": -1.0}, ValueError, r"eps is -1, expected"),
        ({"out": ones(3, 4, 63)}, ValueError, r"out has shape \[3, 4, 63\], expected \[3, 4, 64\]"),
        ({"sinks": ones(4)}, TypeError, r"has no argument sinks"),
        ({"kernel": "f32_abacus"}, ValueError, r"no kernel is called 'f32_abacus'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(changes, exception, message):
    with pytest.raises(exception, match="decode_attention: " + message):
        minivllm.decode_attention(**arguments(**changes))


def test_overlaps_are_refused_and_views_of_one_buffer_are_fine():
    both = np.zeros((2, 3, 2, 9, 64), np.float32)
    minivllm.decode_attention(**arguments(key_cache=both[0], value_cache=both[1]))
    rows = np.zeros((3, 9, 2, 2, 64), np.float32).transpose(3, 0, 2, 1, 4)  # a position's key and value side by side
    minivllm.decode_attention(**arguments(key_cache=rows[0], value_cache=rows[1]))
    assert (rows[:, :, :, 0] == 1).all() and (rows[:, :, :, 1:] == 0).all()
    with pytest.raises(ValueError, match="key_cache overlaps value_cache"):
        minivllm.decode_attention(**arguments(key_cache=both[0], value_cache=both[0]))
    given = arguments()
    with pytest.raises(ValueError, match="out overlaps q"):
        minivllm.decode_attention(**given, out=given["q"])
    with pytest.raises(ValueError, match="key_cache overlaps k"):
        minivllm.decode_attention(**arguments(k=given["key_cache"][:, :, 0], key_cache=given["key_cache"]))


def test_no_sequences(device, framework):
    q, k, v, *caches = (
        framework.full(shape, 1.0, "f32")
        for shape in ((0, 1, 4, 64), (0, 2, 64), (0, 2, 64), (0, 2, 9, 64), (0, 2, 9, 64))
    )
    out = minivllm.decode_attention(q, k, v, *caches, framework.integers([], True))
    assert tuple(out.shape) == (0, 1, 4, 64)


# ---- frameworks -----------------------------------------------------------------------------------------------------


def torch_arguments(torch, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(value.shape, generator=generator).to(device) for name, value in arguments().items()}
    return given | {"positions": torch.tensor([0, 5, 8], device=device)}


def test_torch_knows_what_is_written(device, torch):
    import minivllm.torch  # noqa: F401

    given = torch_arguments(torch, device)
    tensors = [given[name] for name in ("q", "key_cache", "value_cache")]
    before = [tensor._version for tensor in tensors]
    out = torch.empty_like(given["q"])
    assert minivllm.decode_attention(**given, out=out) is out
    assert [tensor._version - version for tensor, version in zip(tensors, before)] == [0, 1, 1]
    schema = torch.ops.minivllm.decode_attention.default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["key_cache", "value_cache"]


@pytest.mark.parametrize("one_base", [False, True])
def test_a_compiled_graph_does_not_copy_the_cache(device, torch, one_base):
    """Nor where both caches are slices of one tensor, which the graph is given."""
    from torch._inductor.utils import run_and_get_code

    given = torch_arguments(torch, device)
    names = ("key_cache", "value_cache")
    expected = {name: given[name].clone() for name in names}
    wanted = minivllm.decode_attention(**(given | expected))
    caches = [given.pop(name) for name in names]
    caches = torch.stack(caches) if one_base else caches
    torch.compiler.reset()

    def step(given, caches):
        return minivllm.decode_attention(**given, key_cache=caches[0], value_cache=caches[1])

    out, code = run_and_get_code(torch.compile(step, fullgraph=True), given, caches)
    assert torch.equal(out, wanted)
    for name, cache in zip(names, caches):
        assert torch.equal(expected[name], cache), name
    assert largest_allocation(code) < expected["key_cache"].numel()


def test_a_graph_that_is_given_two_views_of_one_cache(device, torch):
    """Inductor would copy both, in torch 2.11 from the wrong place: the op runs outside of the graph, or is refused."""
    given = torch_arguments(torch, device)
    expected = {name: given[name].clone() for name in ("key_cache", "value_cache")}
    wanted = minivllm.decode_attention(**(given | expected))
    for fullgraph in (False, True):
        both = torch_arguments(torch, device)
        both["key_cache"], both["value_cache"] = torch.stack([both["key_cache"], both["value_cache"]])
        before = both["value_cache"].clone()
        torch.compiler.reset()
        step = torch.compile(lambda given: minivllm.decode_attention(**given), fullgraph=fullgraph)
        if fullgraph:
            with pytest.raises(
                torch._dynamo.exc.Unsupported, match="two tensors that are views of one; with fullgraph"
            ):
                step(both)
            assert torch.equal(both["value_cache"], before)
        else:
            assert torch.equal(step(both), wanted)
            assert all(torch.equal(both[name], cache) for name, cache in expected.items())


def test_gradients_are_refused(torch):
    given = torch_arguments(torch)
    for name in ("q", "key_cache"):
        tensors = given | {name: given[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"decode_attention: {name} requires grad .* under torch.no_grad"):
            minivllm.decode_attention(**tensors)
        with torch.no_grad():
            minivllm.decode_attention(**tensors)


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    given = arguments(positions=np.array([0, 5, 8], np.int32))
    rng = random("jax")
    for name, array in given.items():
        if name != "positions":
            array[...] = rng.standard_normal(array.shape)
    arrays = {name: jax.numpy.array(array) for name, array in given.items()}
    out, keys, values = ops.decode_attention(**arrays)
    assert_same_bits(np.asarray(arrays["key_cache"]), given["key_cache"], "an input")
    wanted = minivllm.decode_attention(**given)
    for got, want in ((out, wanted), (keys, given["key_cache"]), (values, given["value_cache"])):
        assert_same_bits(np.asarray(got), want)
    rest = {name: array for name, array in arrays.items() if "cache" not in name}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def donating(key_cache, value_cache, rest):
        return ops.decode_attention(key_cache=key_cache, value_cache=value_cache, **rest)

    places = keys.unsafe_buffer_pointer(), values.unsafe_buffer_pointer()
    out, keys, values = donating(keys, values, rest)
    assert places == (keys.unsafe_buffer_pointer(), values.unsafe_buffer_pointer()), "in place where donated"
    assert_same_bits(np.asarray(out), wanted)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda q: ops.decode_attention(**(arrays | {"q": q})))(jax.numpy.stack([arrays["q"]] * 2))


@pytest.mark.gpu
@pytest.mark.parametrize("static_rows", [False, True])
@pytest.mark.parametrize("heads, dim, columns", [(8, 128, 0), (4, 128, 128), (24, 64, 64)])
def test_a_graph_serves_every_length(cuda_torch, heads, dim, columns, static_rows):
    """Captured once, replayed with other positions, which a copy in front of the call brings: as eager calls on copies,
    whatever may be loaded before the position is known."""
    torch, rows = cuda_torch, (2, 2, 3000, dim)
    shapes = {"q": (2, heads, dim), "k": (2, 2, dim), "v": (2, 2, dim), "key_cache": rows, "value_cache": rows}
    if columns:
        shapes |= dict.fromkeys(("cos", "sin"), (2, columns)) | dict.fromkeys(
            ("q_norm_weight", "k_norm_weight"), (dim,)
        )
    given = {name: torch.randn(shape, device="cuda").bfloat16() for name, shape in shapes.items()}
    given["positions"] = torch.zeros(2, dtype=torch.int64, device="cuda")
    wanted = torch.zeros_like(given["positions"])
    minivllm.decode_attention(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given["positions"].copy_(wanted)
        out = minivllm.decode_attention(**given, static_rows=static_rows)
    for positions in ((0, 1), (63, 64), (2999, 5), (-1, 700), (1, 3000), (1400, 1700)):
        wanted.copy_(torch.tensor(positions))
        copies = {name: tensor.clone() for name, tensor in given.items()} | {"positions": wanted.clone()}
        graph.replay()
        assert_same_bits(out, to_float64(minivllm.decode_attention(**copies)), str(positions))
        assert_same_bits(given["key_cache"], to_float64(copies["key_cache"]), str(positions))
