"""What the C functions refuse of plain tensors is refused in the same words where torch takes part in a call."""

import contextlib

import numpy as np
import pytest

import minivllm

pytestmark = pytest.mark.usefixtures("torch")


class Tensors:
    """Fresh ones, some of which share memory. `way`: why the call goes through torch."""

    def __init__(self, torch, way="plain"):
        self.torch, self.way = torch, way
        device = "meta" if way == "meta" else "cpu"
        generator = torch.Generator().manual_seed(0)
        self.buffer = torch.randn(40, 8, generator=generator).to(device)
        self.x, self.residual, self.out, self.total = self.buffer[:15].reshape(5, 3, 8).unbind()[:4]
        self.norm = torch.ones(3, 8, device=device)
        self.weight = torch.randn(16, 8, generator=generator).to(device)
        self.square = torch.randn(8, 8, generator=generator).to(device)
        self.bias = torch.zeros(16, device=device)
        if way == "subclass":
            self.x = self.x.as_subclass(type("Named", (torch.Tensor,), {}))
        if way == "gradient":
            self.norm.requires_grad_()

    def conjugate_imag(self, real):
        """Negated as torch marks it by itself, and contiguous in its last dimension: it looks ordinary."""
        imag = self.torch.complex(real, real).conj().imag
        return imag.as_strided(imag.shape, (2 * imag.shape[1], 1))

    def rms_norm(self, **given):
        return minivllm.rms_norm(**({"x": self.x, "weight": self.norm[0]} | given))

    def add_rms_norm(self, **given):
        return minivllm.add_rms_norm(**({"x": self.x, "residual": self.residual, "weight": self.norm[0]} | given))

    def project(self, **given):
        arguments = {"x": self.x, "norm_weight": self.norm[0], "qkv_weight": self.weight}
        return minivllm.rms_norm_qkv(**(arguments | {"num_heads": 2, "num_kv_heads": 1} | given))


@contextlib.contextmanager
def mode(torch, way):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if way == "fake" else contextlib.nullcontext():
        yield


def refusal(torch, call, way):
    with mode(torch, way):
        tensors = Tensors(torch, way)
        before = tensors.buffer.clone()
        with pytest.raises((TypeError, ValueError)) as refused:
            call(tensors)
        assert way in ("meta", "fake") or tensors.buffer.equal(before)
    return refused.type, str(refused.value)


OPTIONS = (
    [{name: value} for name in ("eps", "weight_offset") for value in (None, True, "1", float("nan"))]
    + [{name: value} for name in ("batch_invariant", "allow_tf32", "static_weights") for value in (None, 1)]
    + [{name: value} for name in ("num_heads", "num_kv_heads", "head_dim") for value in (0, 2.0, True)]
    + [{name: value} for name in ("rounding", "weight_layout") for value in (None, "no")]
    + [{"eps": -1}, {"kernel": 5}, {"head_dim": 5}, {"num_heads": None}, {"num_heads": 3}]
)

ARGUMENTS = {
    "bias of no members": lambda t: t.project(bias=()),
    "bias of one member": lambda t: t.project(bias=(t.bias,)),
    "bias too short": lambda t: t.project(bias=t.bias[:15]),
    "a weight of one member": lambda t: t.project(qkv_weight=[t.weight]),
    "a weight of one dimension": lambda t: t.project(qkv_weight=t.weight[0]),
    "a weight of another size": lambda t: t.project(qkv_weight=t.weight[:, :7]),
    "a member of another size": lambda t: t.project(qkv_weight=(t.weight[:8], t.weight[:4], t.weight[:3])),
    "a square weight": lambda t: t.project(qkv_weight=t.square, num_heads=2),
    "a square weight's .t()": lambda t: t.project(qkv_weight=t.square.t(), num_heads=2),
    "a norm weight of another size": lambda t: t.rms_norm(weight=t.bias),
    "a weight of another dtype": lambda t: t.rms_norm(weight=t.norm[0].half()),
    "a weight of neither dtype": lambda t: t.rms_norm(x=t.x.bfloat16(), weight=t.norm[0].half()),
    "a residual of another shape": lambda t: t.add_rms_norm(residual=t.residual[:2]),
    "a residual of another dtype": lambda t: t.add_rms_norm(residual=t.residual.half()),
    "x in columns": lambda t: t.rms_norm(x=t.x.t().contiguous().t()),
    "a negated x": lambda t: t.rms_norm(x=t.torch._neg_view(t.x)),
    "a negated weight": lambda t: t.project(qkv_weight=t.torch._neg_view(t.weight)),
    "the imaginary part of a conjugate": lambda t: t.add_rms_norm(residual=t.conjugate_imag(t.residual)),
    "no residual": lambda t: t.add_rms_norm(residual=None),
    "eps": lambda t: t.rms_norm(eps=-1.0),
    "rounding": lambda t: t.add_rms_norm(rounding="no"),
    "in place, of another shape": lambda t: minivllm.fused_add_rms_norm(t.x.detach(), t.out[:2], t.norm[0].detach()),
}

OUTPUTS = {
    "one for both": lambda t: t.add_rms_norm(out=t.out, residual_out=t.out),
    "two that overlap": lambda t: t.add_rms_norm(out=t.buffer[20:23], residual_out=t.buffer[22:25]),
    "over the weight": lambda t: t.rms_norm(out=t.norm),
    "partly over x": lambda t: t.rms_norm(out=t.buffer[1:4]),
    "partly over the residual": lambda t: t.add_rms_norm(residual_out=t.buffer[2:5]),
    "both x": lambda t: minivllm.fused_add_rms_norm(t.x, t.x, t.norm[0]),
    "over x of the projection": lambda t: t.project(qkv_weight=t.square, weight_layout="out_in", out=t.x),
    "over its weight": lambda t: t.project(out=t.weight[:3, :].view(24)[:48].view(3, 8)),
    "over its residual": lambda t: t.project(residual=t.residual, residual_out=t.residual),
    "without a residual": lambda t: t.project(residual_out=t.out),
    "in columns": lambda t: t.rms_norm(out=t.out.t().contiguous().t()),
    "of shared elements": lambda t: t.rms_norm(out=t.out[:1].expand(3, 8)),
    "negated": lambda t: t.rms_norm(out=t.torch._neg_view(t.out)),
    "of another shape": lambda t: t.rms_norm(out=t.buffer[20:24]),
    "of another dtype": lambda t: t.rms_norm(out=t.out.half()),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("jagged", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_nested_tensor(torch, jagged, grad):
    layout = torch.jagged if jagged else torch.strided
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=layout)
    refused = pytest.raises(TypeError, match=r"^rms_norm: x is a nested tensor, expected a dense one; call this on its")
    with torch.set_grad_enabled(grad), refused:
        minivllm.rms_norm(nested, torch.ones(8))


@pytest.mark.parametrize("way", ["subclass", "gradient", "meta", "fake"])
@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_options(torch, given, way):
    assert refusal(torch, lambda t: t.project(**given), way) == refusal(torch, lambda t: t.project(**given), "plain")


@pytest.mark.parametrize("way", ["subclass", "gradient", "meta", "fake"])
@pytest.mark.parametrize("call", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(torch, call, way):
    assert refusal(torch, call, way) == refusal(torch, call, "plain")


@pytest.mark.parametrize("way", ["subclass", "meta", "fake"])
@pytest.mark.parametrize("call", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(torch, call, way):
    assert refusal(torch, call, way) == refusal(torch, call, "plain")


@pytest.mark.parametrize("way", ["subclass", "meta", "fake"])
def test_outputs_that_may_share_memory_do(torch, way):
    for outputs in (
        lambda t: {"out": t.x},
        lambda t: {"out": t.residual, "residual_out": t.x},
        lambda t: {"residual_out": t.residual},
        lambda t: {"out": t.buffer[20:23], "residual_out": t.buffer[23:26]},
    ):
        plain = Tensors(torch)
        expected = plain.add_rms_norm()
        with mode(torch, way):
            tensors = Tensors(torch, way)
            given = outputs(tensors)
            got = tensors.add_rms_norm(**given)
        for name, a, b in zip(("out", "residual_out"), got, expected):
            assert a is given[name] if name in given else a.shape == b.shape
            assert way in ("meta", "fake") or a.as_subclass(torch.Tensor).equal(b)


def test_a_tensor_without_memory_beside_others(torch):
    """torch would compute nothing at all for it, and give memory that nobody wrote."""
    import minivllm.torch  # noqa: F401

    t = Tensors(torch)
    with pytest.raises(ValueError, match=r"^rms_norm: weight is on meta, expected cpu \(where x is\)"):
        t.rms_norm(weight=t.norm[0].to("meta"))
    with pytest.raises(ValueError, match=r"^rms_norm_qkv: qkv_weight\[1\] is on meta, expected cpu \(where x is\)"):
        t.project(qkv_weight=(t.weight[:8], t.weight[8:12].to("meta"), t.weight[12:]))
    with pytest.raises(ValueError, match=r"^fused_add_rms_norm: weight is on meta, expected cpu \(where x is\)"):
        minivllm.fused_add_rms_norm(t.x, t.residual, t.norm[0].to("meta"))
    with pytest.raises(ValueError, match=r"^fused_add_rms_norm: residual is on cpu, expected meta \(where x is\)"):
        minivllm.fused_add_rms_norm(t.x.to("meta"), t.residual, t.norm[0])
    graph = torch.compile(lambda x, weight: minivllm.rms_norm(x, weight), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"rms_norm: weight is on meta, expected cpu \(where x is\)"):
        graph(t.x, t.norm[0].to("meta"))


def test_numbers_of_other_types(torch):
    """NumPy's, as plain calls take them."""
    t = Tensors(torch, "gradient")
    options = {"num_heads": np.int64(2), "num_kv_heads": np.int32(1), "eps": np.float32(1e-5)}
    for a, b in zip(t.project(**options), Tensors(torch).project(**options)):
        assert a.equal(b)


def test_in_a_graph(torch):
    """Where a tensor is, torch.compile does not know; that it is the same one, it does."""
    torch.compiler.reset()
    for call, message in (
        (OUTPUTS["one for both"], "add_rms_norm: out overlaps residual_out"),
        (OUTPUTS["over x of the projection"], "rms_norm_qkv: out overlaps x"),
        (OUTPUTS["without a residual"], "rms_norm_qkv: residual_out was given without a residual"),
        (ARGUMENTS["a weight of one member"], "rms_norm_qkv: qkv_weight has 1 members"),
        (ARGUMENTS["bias of no members"], "rms_norm_qkv: bias has 0 members"),
    ):
        t = Tensors(torch)
        before = t.buffer.clone()
        with pytest.raises(ValueError, match=message):
            torch.compile(call, backend="aot_eager")(t)
        assert t.buffer.equal(before)
    t = Tensors(torch)
    expected = Tensors(torch).add_rms_norm()
    got = torch.compile(lambda t: t.add_rms_norm(out=t.residual, residual_out=t.x), backend="aot_eager")(t)
    assert got[0].equal(expected[0]) and t.x.equal(expected[1])
