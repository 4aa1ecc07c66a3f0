"""Outputs for torch are torch's own memory: its allocator counts it, its streams and graphs own it, its errors are raised.

Streams and graphs of several ops are in test_cuda.py.
"""

import gc

import pytest
from processes import SANITIZED
from test_leaks import resident_bytes

import minivllm
from minivllm.testing.reference import to_float64

LONG = 200_000_000  # clock cycles of a delay: about a tenth of a second
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 3, 1, 8
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


class Inputs:
    """x [2, 3, HIDDEN] of ones, weights of ones: every output of the projection is HIDDEN / 16 = 4."""

    def __init__(self, torch, device="cpu"):
        self.x = torch.ones(2, 3, HIDDEN, device=device)
        self.weight = torch.ones(HIDDEN, device=device)
        self.matrix = torch.full((QKV, HIDDEN), 1 / 16, device=device)

    def norm(self):
        return minivllm.rms_norm(self.x, self.weight, eps=0.0)

    def qkv(self, **options):
        return minivllm.rms_norm_qkv(self.x, self.weight, self.matrix, HEADS, KV_HEADS, eps=0.0, **options)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def inputs(request, torch):
    if request.param == "cuda":
        request.getfixturevalue("cuda_torch")
    return Inputs(torch, request.param)


def is_filled(tensor, value):
    return abs(to_float64(tensor) - value).max(initial=0) < 1e-5


def shapes_and_places(parts):
    return [(tuple(part.shape), part.stride(), part.storage_offset()) for part in parts]


def test_fresh_outputs_are_real_storages(torch, inputs):
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            normed = inputs.norm()
            parts = inputs.qkv()
            reference = torch.empty_like(inputs.x)
        for tensor in (normed, *parts):
            assert type(tensor) is torch.Tensor and tensor.device == inputs.x.device
            assert tensor.untyped_storage().resizable() and reference.untyped_storage().resizable()
            assert not tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
            assert tensor.is_inference() == reference.is_inference()
            assert is_filled(tensor, 4 if tensor.ndim == 4 else 1)
        assert normed.untyped_storage().nbytes() == inputs.x.nbytes
        storage = parts[0].untyped_storage()
        assert storage.nbytes() == 6 * QKV * 4
        assert {part.untyped_storage().data_ptr() for part in parts} == {storage.data_ptr()}
        strides = (3 * QKV, QKV, HEAD_DIM, 1)
        assert shapes_and_places(parts) == [
            ((2, 3, HEADS, HEAD_DIM), strides, 0),
            ((2, 3, KV_HEADS, HEAD_DIM), strides, HEADS * HEAD_DIM),
            ((2, 3, KV_HEADS, HEAD_DIM), strides, (HEADS + KV_HEADS) * HEAD_DIM),
        ]


@pytest.mark.parametrize("tokens", [0, 3])
def test_parts_of_a_given_output(torch, inputs, tokens):
    """They lie where torch's own views would, also in a part of a larger tensor."""
    inputs.x = inputs.x[:, :tokens]
    wide = torch.zeros(2, 5, QKV + 7, device=inputs.x.device)
    out = wide[:, 1 : 1 + tokens, 4 : 4 + QKV]
    views = out.unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], -2)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        out.zero_()
        with mode():
            parts = inputs.qkv(out=out)
        assert shapes_and_places(parts) == shapes_and_places(views)
        assert all(is_filled(part, 4) for part in (*parts, out))
        out.zero_()
        assert not wide.any(), "something was written beside out"
        assert {part.untyped_storage().data_ptr() for part in parts} == {wide.untyped_storage().data_ptr()}


def test_autograd_knows_views_of_a_given_output(torch, inputs):
    """Where gradients are recorded, what happens to a part is known to have happened to `out`, and the other way
    round."""
    wide = torch.zeros(2, 3, QKV + 7, device=inputs.x.device)
    out = wide[..., 4 : 4 + QKV]
    factor = torch.tensor(2.0, device=out.device, requires_grad=True)
    q, k, v = inputs.qkv(out=out)
    for part, heads in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS)):
        assert part._is_view() and part._base is wide and part.shape == (2, 3, heads, HEAD_DIM)
    k.mul_(factor)
    out.sum().backward()
    assert float(factor.grad) == k.numel() * 4
    factor.grad = None
    out = torch.empty(2, 3, QKV, device=inputs.x.device)
    q, k, v = inputs.qkv(out=out)
    out.mul_(factor)
    v.sum().backward()
    assert float(factor.grad) == v.numel() * 4


@pytest.mark.parametrize("mode", ["enable_grad", "no_grad"])
def test_parts_of_a_given_output_have_its_version(torch, inputs, mode):
    """So that a tensor which a backward pass needs is known to have changed, under whichever name it was written."""
    out = torch.empty(2, 3, QKV, device=inputs.x.device)
    factor = torch.ones(1, device=out.device, requires_grad=True)
    with getattr(torch, mode)():
        before = out._version
        parts = inputs.qkv(out=out)
        assert out._version == before + 1
        for part in parts:
            for written in (part, out):
                product = out.detach() * factor if mode == "enable_grad" else None
                before = out._version
                written.add_(1)
                assert {each._version for each in (out, *parts)} == {before + 1}
                if product is not None:
                    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                        product.sum().backward()
    fresh = inputs.qkv()
    fresh[0].add_(1)
    assert [part._version for part in fresh] == [1, 0, 0]  # of a packed tensor that nobody else has


def test_versions_in_inference_mode(torch, inputs):
    """A tensor of other modes has its version there too; one that was made there has none, wherever it is written."""
    out = torch.empty_like(inputs.x)
    with torch.inference_mode():
        before = out._version
        minivllm.rms_norm(inputs.x, inputs.weight, eps=0.0, out=out)
        assert out._version == before + 1
        packed = torch.empty(2, 3, QKV, device=out.device)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            packed.zero_() if mode is torch.inference_mode else None
            assert all(is_filled(part, 4) for part in inputs.qkv(out=packed))


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer ends a process that asks for so much")
def test_torch_says_why_there_is_no_memory(torch, inputs):
    x = inputs.x[:1, :1].expand(2**20, 2**25, HIDDEN)
    error = torch.OutOfMemoryError if x.is_cuda else RuntimeError
    with pytest.raises(error, match="allocate"):
        minivllm.rms_norm(x, inputs.weight)
    with pytest.raises(error, match="allocate"):
        minivllm.rms_norm_qkv(x, inputs.weight, inputs.matrix, HEADS, KV_HEADS)


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory for a while, by design")
def test_memory_is_given_back(torch):
    x, weight = torch.ones(1, 1 << 20), torch.ones(1 << 20)
    matrix, out = torch.ones(3, 1 << 20), torch.empty(1, 3)

    def call():
        minivllm.rms_norm(x, weight)
        minivllm.add_rms_norm(x, x, weight)
        minivllm.rms_norm_qkv(x, weight, matrix, 1, 1, residual=x)
        minivllm.rms_norm_qkv(x, weight, matrix, 1, 1, out=out)

    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            for _ in range(5):
                call()
            gc.collect()
            before = resident_bytes()
            for _ in range(50):
                call()
            assert resident_bytes() - before < 32 << 20, "50 outputs of 4 MiB are still there"


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_allocator_counts_outputs(cuda_torch):
    inputs = Inputs(cuda_torch, "cuda")
    inputs.qkv()
    before = cuda_torch.cuda.memory_allocated()
    q, k, v = inputs.qkv()
    assert cuda_torch.cuda.memory_allocated() - before == -(-6 * QKV * 4 // 512) * 512
    del q, k
    assert cuda_torch.cuda.memory_allocated() > before, "v holds the packed buffer"
    del v
    assert cuda_torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("op", ["norm", "qkv"])
def test_record_stream_protects_an_output(cuda_torch, op, recorded):
    """While a side stream still reads it, its memory is not given out again; unrecorded, it is at once."""
    torch, inputs = cuda_torch, Inputs(cuda_torch, "cuda")

    def call():
        result = getattr(inputs, op)()
        return result if op == "norm" else result[1]

    torch.cuda.empty_cache()
    side = torch.cuda.Stream()
    out = call()
    expected, place = out.clone(), out.data_ptr()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        copy = torch.empty_like(out)
        torch.cuda._sleep(LONG)
        copy.copy_(out)
    if recorded:
        out.record_stream(side)
    del out
    inputs.x.zero_()
    later = [call() for _ in range(32)]
    assert (place in [tensor.data_ptr() for tensor in later]) == (not recorded)
    torch.cuda.synchronize()
    assert not recorded or torch.equal(copy, expected)


@pytest.mark.gpu
def test_outputs_of_a_capture_are_in_the_graphs_pool(cuda_torch):
    torch, inputs = cuda_torch, Inputs(cuda_torch, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, _, _ = inputs.qkv()
    pools = {
        tuple(segment["segment_pool_id"])
        for segment in torch.cuda.memory_snapshot()
        if segment["address"] <= q.data_ptr() < segment["address"] + segment["total_size"]
    }
    assert pools == {tuple(graph.pool())}
    graph.replay()
    torch.cuda.synchronize()
    assert is_filled(q, 4)


@pytest.mark.gpu
def test_outputs_come_from_a_pool_in_use(cuda_torch):
    """torch.cuda.MemPool: an application's own pool, for this thread."""
    torch, inputs = cuda_torch, Inputs(cuda_torch, "cuda")
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        q, _, _ = inputs.qkv()
    assert any(s["address"] <= q.data_ptr() < s["address"] + s["total_size"] for s in pool.snapshot())
