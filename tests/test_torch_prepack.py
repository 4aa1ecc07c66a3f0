"""The copy of its weights that a prepacked layer computes with: a gradient that reaches it is never lost in silence."""

import copy
import io
import pickle

import pytest
from cases import assert_same_bits
from torch_calls import HEADS, KV_HEADS, SIZES, Inputs

import minivllm

REFUSAL = "qkv_weight requires grad, but prepack=True computes with a copy of it"


def prepacked(i, weight, **options):
    arguments = {"norm_weight": i.norm, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "prepack": True}
    return minivllm.FusedRMSNormQKV(qkv_weight=weight, **(arguments | options))


def saved_and_loaded(torch, layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_does_not_learn(torch, device):
    i = Inputs(device)
    weight = torch.nn.Parameter(i.wide)
    i.norm.requires_grad_()
    layer = prepacked(i, weight)
    layer.refresh()
    with pytest.raises(RuntimeError, match=REFUSAL):
        layer(i.x)[0].sum().backward()
    prepacked(i, weight.detach())(i.x)[0].sum().backward()
    assert i.norm.grad is not None


def test_nor_does_a_copy_of_it(torch, device):
    i = Inputs(device)
    layer = prepacked(i, torch.nn.Parameter(i.wide))
    copies = [copy.copy(layer), copy.deepcopy(layer), copy.deepcopy(copy.deepcopy(layer))]
    for twin in (*copies, pickle.loads(pickle.dumps(layer)), saved_and_loaded(torch, layer)):
        with pytest.raises(RuntimeError, match=REFUSAL):
            sum(part.sum() for part in twin(i.x)).backward()
        with torch.no_grad():
            assert_same_bits(twin(i.x)[0], layer(i.x)[0])
    for twin in (copies[1], pickle.loads(pickle.dumps(layer))):  # which have weights of their own
        twin.qkv_weight.requires_grad_(False)
        assert not twin(i.x)[0].requires_grad and layer(i.x)[0].requires_grad
        before = layer(i.x)[0].detach().clone()
        twin.qkv_weight.mul_(2)
        twin.refresh()
        assert_same_bits(twin(i.x)[0], 2 * before)
        assert_same_bits(layer(i.x)[0].detach(), before)


@pytest.mark.parametrize("several", [False, True])
def test_weights_may_be_frozen_and_thawed(torch, device, several):
    """Without a refresh, and with many."""
    i = Inputs(device)
    weights = i.square.split(SIZES) if several else i.square.split(len(i.square))
    weights = tuple(torch.nn.Parameter(weight, requires_grad=False) for weight in weights)
    layer = prepacked(i, weights if several else weights[0], weight_layout="out_in")
    expected = layer(i.x)[0]
    for _ in range(3):
        weights[-1].requires_grad_()
        with pytest.raises(RuntimeError, match=REFUSAL):
            layer(i.x)[0].sum().backward()
        with torch.no_grad():
            assert_same_bits(layer(i.x)[0], expected)
        layer.refresh()
        weights[-1].requires_grad_(False)
        assert not layer(i.x)[0].requires_grad
        assert type(layer(i.x)[0]) is torch.Tensor
    x = i.x.clone().requires_grad_()
    layer(x)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("learns", [False, True])
def test_a_graph(torch, device, learns):
    i = Inputs(device)
    i.norm.requires_grad_()
    layer = prepacked(i, torch.nn.Parameter(i.wide, requires_grad=learns))
    torch.compiler.reset()
    with torch.no_grad():
        assert_same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(i.x)[0], layer(i.x)[0])
    graph = torch.compile(lambda x: layer(x)[0].sum(), backend="aot_eager")
    if learns:
        with pytest.raises(RuntimeError, match=REFUSAL):
            graph(i.x).backward()
    else:
        graph(i.x).backward()
        assert i.norm.grad is not None


@pytest.mark.gpu
def test_a_cuda_graph_refreshes(cuda_torch):
    """Weights that change between replays are copied by the graph itself, to the same address."""
    i = Inputs("cuda")
    weight = i.wide.clone()
    layer = prepacked(i, weight)
    with cuda_torch.no_grad():
        layer(i.x)
        graph = cuda_torch.cuda.CUDAGraph()
        with cuda_torch.cuda.graph(graph):
            layer.refresh()
            q, *_ = layer(i.x)
        for scale in (2.0, -0.5):
            weight.mul_(scale)
            graph.replay()
            assert_same_bits(q, prepacked(i, weight)(i.x)[0])


def test_refresh_adds_nothing(torch, device):
    i = Inputs(device)
    layer = prepacked(i, torch.nn.Parameter(i.wide))
    address, size = layer._packed.data_ptr(), len(pickle.dumps(layer))
    for _ in range(3):
        layer.refresh()
    assert layer._packed.data_ptr() == address
    assert not layer._packed._backward_hooks and len(pickle.dumps(layer)) == size


def test_members_of_several_dtypes(device, framework):
    weights = [framework.full((8, 16), 1.0, dtype) for dtype in ("f16", "f32", "f32")]
    with pytest.raises(TypeError, match="one matrix of qkv_weight, whose members are float16, float32, float32; pass"):
        minivllm.FusedRMSNormQKV(
            norm_weight=framework.full((16,), 1.0, "f32"), qkv_weight=weights, num_heads=1, num_kv_heads=1, prepack=True
        )


def test_a_weight_that_changed_its_dtype(torch, device):
    i, short = Inputs(device), Inputs(device, "bf16")
    weight = torch.nn.Parameter(short.wide)
    layer = prepacked(short, weight)
    assert layer(short.x)[0].dtype == torch.bfloat16 and layer.prepacked_bytes == 2 * weight.numel()
    weight.data, layer.norm_weight = i.wide, i.norm
    layer.refresh()
    with torch.no_grad():
        assert_same_bits(layer(i.x)[0], minivllm.rms_norm_qkv(i.x, i.norm, i.wide, HEADS, KV_HEADS)[0])
    assert layer.prepacked_bytes == 4 * weight.numel()
