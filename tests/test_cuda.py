"""What only a GPU shows: streams, graphs, programmatic dependent launch, devices, memory."""

import threading

import frameworks
import numpy as np
import pytest
from cases import UNALIGNED, assert_same_bits, normal
from checks import QKV, Norm, check_norm, check_qkv
from conftest import head_dim_for, roundings_of, short_dtype
from frameworks import TORCH_CUDA, hopper_dtype
from processes import succeeds

import minivllm
from minivllm.testing.reference import to_float64

pytestmark = pytest.mark.gpu
LONG = 200_000_000  # clock cycles of a delay: about a tenth of a second


@pytest.fixture
def torch(cuda_torch):
    yield cuda_torch
    cuda_torch.cuda.synchronize()


class Ops:
    """Every op on fixed weights, each as x -> tensor; x is [tokens, 256] in bfloat16."""

    def __init__(self, torch, hidden=256, dtype="bf16"):
        def tensor(shape, key, **options):
            return TORCH_CUDA.tensor(normal(shape, dtype, key, **options), dtype)

        self.hidden, self.dtype = hidden, dtype
        self.weight = tensor((hidden,), "w", scale=0.2, mean=1.0)
        self.residual = tensor((512, hidden), "r")
        self.matrix = tensor((5 * 64, hidden), "m", scale=0.05)
        self.bias = tensor((5 * 64,), "b")
        self.all = {
            "rms_norm": lambda x: minivllm.rms_norm(x, self.weight),
            "add_rms_norm": lambda x: torch.cat(minivllm.add_rms_norm(x, self.residual[: len(x)], self.weight)),
            "rms_norm_qkv": lambda x: self.join(
                torch, minivllm.rms_norm_qkv(x, self.weight, self.matrix, 3, 1, bias=self.bias)
            ),
            "tuple": lambda x: self.join(
                torch, minivllm.rms_norm_qkv(x, self.weight, self.matrix.split([192, 64, 64]), 3, 1)
            ),
            "residual": lambda x: self.join(
                torch, minivllm.rms_norm_qkv(x, self.weight, self.matrix, 3, 1, residual=self.residual[: len(x)])[:3]
            ),
            "batch_invariant": lambda x: self.join(
                torch, minivllm.rms_norm_qkv(x, self.weight, self.matrix, 3, 1, batch_invariant=True)
            ),
        }
        for row in minivllm.kernels("rms_norm_qkv"):
            if row.usable and row.isa.startswith("sm") and row.name.startswith(dtype + "_"):
                options = {"kernel": row.name, "rounding": roundings_of(row)[0]}
                self.all[row.name] = lambda x, options=options: self.join(
                    torch, minivllm.rms_norm_qkv(x, self.weight, self.matrix, 3, 1, **options)
                )

    @staticmethod
    def join(torch, parts):
        return torch.cat([part.flatten(1) for part in parts], 1)

    def x(self, tokens, key=0):
        return TORCH_CUDA.tensor(normal((tokens, self.hidden), self.dtype, "x", tokens, key), self.dtype)

    def cases(self, token_counts=(1, 4, 64, 300)):
        """(name, op, tokens) for which the op serves; a forced kernel may refuse."""
        for name, op in self.all.items():
            for tokens in token_counts:
                try:
                    op(self.x(tokens))
                except ValueError as error:
                    assert "cannot serve this call" in str(error)
                    continue
                yield name, op, tokens


def test_the_current_stream(torch):
    """On a side stream, x is filled late: a launch on any other stream would read what was there before."""
    ops, side = Ops(torch), torch.cuda.Stream()
    for name, op, tokens in ops.cases():
        x, late = torch.zeros_like(ops.x(tokens)), ops.x(tokens)
        expected = op(late)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG // 40)
            x.copy_(late)
            got = op(x)
            got = got.clone()
        side.synchronize()
        assert torch.equal(got, expected), f"{name}, {tokens} tokens"


def test_calls_do_not_wait(torch):
    """An op returns while the GPU is still busy with what came before, and allocates nothing when given its outputs."""
    ops = Ops(torch)
    x, out, packed = ops.x(4), torch.empty_like(ops.x(4)), torch.empty(4, 320, dtype=torch.bfloat16, device="cuda")

    def calls():
        minivllm.rms_norm(x, ops.weight, out=out)
        minivllm.add_rms_norm(x, out, ops.weight, out=x, residual_out=out)
        minivllm.rms_norm_qkv(x, ops.weight, ops.matrix, 3, 1, out=packed)

    calls()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    done = torch.cuda.Event()
    torch.cuda._sleep(LONG * 3)
    calls()
    done.record()
    assert not done.query(), "a call waited for the GPU"
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "a call with outputs given allocated memory"


def capture(torch, call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_graphs_replay_with_changed_data(torch):
    """Captured warm; x, residual and weights change between replays."""
    ops = Ops(torch)
    for name, op, tokens in ops.cases((1, 3, 200)):
        x = ops.x(tokens)
        graph, result = capture(torch, lambda op=op, x=x: op(x))
        for key in (1, 2, 3):
            x.copy_(ops.x(tokens, key))
            if key == 2:
                ops.matrix.mul_(-0.5), ops.weight.mul_(2.0), ops.residual.neg_()
            graph.replay()
            replayed = result.clone()
            assert torch.equal(replayed, op(x)), f"{name}, {tokens} tokens, replay {key}"


COLD = """
    import torch
    import minivllm
    torch.manual_seed(0)
    hidden, tokens = 1024, {tokens}
    x = torch.randn(tokens, hidden, device="cuda").to(torch.{dtype})
    weight = torch.ones(hidden, device="cuda", dtype=torch.{dtype})
    matrix = (0.05 * torch.randn(5 * 64, hidden, device="cuda")).to(torch.{dtype})
    torch.cat([x, x]), torch.cuda.synchronize()
    def call():
        y, total = minivllm.add_rms_norm(x, x, weight)
        return [minivllm.rms_norm(x, weight), y, *minivllm.rms_norm_qkv(y, weight, matrix, 3, 1),
                *minivllm.rms_norm_qkv(y, weight, matrix, 3, 1, batch_invariant=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the process's first launches: nothing was warmed up
        captured = call()
    x.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, call()):
        assert torch.equal(a, b)
"""


@pytest.mark.parametrize("tokens,dtype", [(1, "bfloat16"), (200, "float16"), (16, "float32")])
def test_cold_capture(torch, tokens, dtype):
    succeeds(COLD.format(tokens=tokens, dtype=dtype))


# ---- programmatic dependent launch: a kernel may start before the one in front of it ends ------------------------


def hammer(torch, dtype, tokens, hidden, rounds, versions=4, **options):
    """Rewrites every weight immediately before each call; gives back the number of wrong results."""
    kind = TORCH_CUDA.dtype(dtype)
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape):
        return torch.randn(versions, *shape, device="cuda", generator=generator).to(kind)

    norms, matrices, biases = draw(hidden), draw(5 * 64, hidden) * 0.05, draw(5 * 64)
    norm, matrix, bias = norms[0].clone(), matrices[0].clone(), biases[0].clone()
    x = draw(tokens, hidden)[0]
    out, normed = torch.empty(tokens, 5 * 64, device="cuda", dtype=kind), torch.empty_like(x)

    parts = [(bias, biases), (norm, norms), (matrix, matrices)]

    def rewrite(i):
        for place, source in parts[i % 3 :] + parts[: i % 3]:  # each of them is the last one at times
            place.copy_(source[i])

    def call():
        minivllm.rms_norm_qkv(x, norm, matrix, 3, 1, bias=bias, out=out, **options)

    def norm_call():
        minivllm.rms_norm(x, norm, out=normed)

    expected, expected_norm = [], []
    for i in range(versions):
        rewrite(i)
        torch.cuda.synchronize()
        call(), norm_call()
        torch.cuda.synchronize()
        expected.append(out.clone()), expected_norm.append(normed.clone())
    assert not torch.equal(expected[0], expected[1])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def one_round(i):
        rewrite(i)
        call()
        wrong.add_((out != expected[i]).any())
        norm.copy_(norms[(i + 1) % versions])
        norm_call()
        wrong.add_((normed != expected_norm[(i + 1) % versions]).any())

    for i in range(rounds // 2):
        one_round(i % versions)
    graph, _ = capture(torch, lambda: [one_round(i % versions) for i in range(20)])
    for _ in range(rounds // 40):
        graph.replay()
    return int(wrong)


@pytest.mark.parametrize(
    "dtype,tokens,hidden",
    [("bf16", 1, 1024), ("bf16", 1, 4096), ("f16", 8, 896), ("f32", 2, 1024), ("bf16", 130, 1024)],
)
def test_weights_written_just_before_a_call_are_seen(torch, dtype, tokens, hidden):
    """10,000 calls over the five cases, half of them in graphs, each right after kernels of torch rewrote all its weights."""
    assert hammer(torch, dtype, tokens, hidden, rounds=2000) == 0


LATE = {"rounding": "fp32", "kernel": "bf16_wgmma_sm90a"}


def test_weights_written_just_before_a_call_with_a_late_row_factor_are_seen(torch):
    hopper_dtype("bf16", "wgmma_sm90a")
    assert hammer(torch, "bf16", 130, 1024, rounds=2000, **LATE) == 0


@pytest.mark.parametrize("layer", [False, True], ids=["function", "layer"])
@pytest.mark.parametrize("tokens,options", [(1, {}), (16, {}), (40, {}), (130, {}), (130, LATE)])
def test_weights_written_by_an_op_of_ours(torch, tokens, options, layer):
    """The kernels before write the weights and may let the call start early, and that call the one after it. A function
    does not trust the weights by itself; a layer sees by torch's counters that they were written."""
    if options:
        hopper_dtype("bf16", "wgmma_sm90a")
    hidden = 1024
    source = [torch.randn(320, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    ones = torch.full((hidden,), 0.05, device="cuda", dtype=torch.bfloat16)
    matrix = torch.empty_like(source[0])
    norm_weight = torch.empty_like(ones)
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(tokens, 320, device="cuda", dtype=torch.bfloat16)
    again = torch.empty_like(out)
    if layer and "kernel" in options:
        pytest.skip("a layer takes no kernel by name")
    held = minivllm.FusedRMSNormQKV(norm_weight=norm_weight, qkv_weight=matrix, num_heads=3, num_kv_heads=1)

    def project(out):
        if layer:
            held(x, out=out)
        else:
            minivllm.rms_norm_qkv(x, norm_weight, matrix, 3, 1, out=out, **options)

    def write(i):
        minivllm.rms_norm(source[i], ones, out=matrix)
        minivllm.rms_norm(source[i][7], ones, out=norm_weight)

    def call(i):
        write(i)
        project(out)
        project(again)

    expected = []
    for i in range(2):
        write(i)
        torch.cuda.synchronize()
        project(out)
        torch.cuda.synchronize()
        expected.append(out.clone())
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def rounds():
        for i in range(100):
            call(i % 2)
            wrong.add_((out != expected[i % 2]).any() | (again != expected[i % 2]).any())

    rounds()
    graph, _ = capture(torch, rounds)
    for _ in range(20):
        graph.replay()
    assert int(wrong) == 0


CHAINS = [*((dtype, tokens, {}) for dtype in ("bf16", "f32") for tokens in (1, 3, 40)), ("bf16", 130, LATE)]


@pytest.mark.parametrize("dtype,tokens,options", CHAINS)
def test_a_chain_of_dependent_calls(torch, dtype, tokens, options):
    """Each call reads what the one before wrote, and writes what the one before read."""
    if options:
        hopper_dtype("bf16", "wgmma_sm90a")
    hidden = 320
    kind = TORCH_CUDA.dtype(dtype)
    matrix = TORCH_CUDA.tensor(normal((hidden, hidden), dtype, "chain", scale=1 / 18), dtype)
    weight = torch.ones(hidden, device="cuda", dtype=kind)
    first = TORCH_CUDA.tensor(normal((tokens, hidden), dtype, "chain x", tokens), dtype)
    buffers = [first.clone(), torch.empty_like(first)]
    stream = torch.zeros_like(first)

    def chain(synchronize):
        buffers[0].copy_(first), stream.zero_()
        for i in range(60):
            read, write = buffers[i % 2], buffers[(i + 1) % 2]
            minivllm.rms_norm_qkv(read, weight, matrix, 3, 1, out=write, weight_layout="out_in", **options)
            if synchronize:
                torch.cuda.synchronize()
            minivllm.fused_add_rms_norm(write, stream, weight)
            if synchronize:
                torch.cuda.synchronize()
            minivllm.rms_norm(write, weight, out=write)
            if synchronize:
                torch.cuda.synchronize()
        return torch.cat([buffers[0], stream]).clone()

    expected = chain(synchronize=True)
    assert torch.isfinite(expected).all()
    for _ in range(5):
        assert torch.equal(chain(synchronize=False), expected)
    graph, result = capture(torch, lambda: chain(synchronize=False))
    for _ in range(20):
        graph.replay()
        assert torch.equal(result, expected)


def test_x_written_just_before_a_call_is_seen(torch):
    ops = Ops(torch)
    for name, op, tokens in ops.cases((1, 64)):
        versions = [ops.x(tokens, key) for key in range(3)]
        expected = [op(version).clone() for version in versions]
        x = versions[0].clone()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(200):
            x.copy_(versions[i % 3])
            wrong.add_((op(x) != expected[i % 3]).any())
        assert int(wrong) == 0, f"{name}, {tokens} tokens"


# ---- threads, devices, other frameworks ---------------------------------------------------------------------------


def test_threads_with_a_stream_each(torch):
    ops = Ops(torch)
    cases = [(name, op, ops.x(tokens), op(ops.x(tokens))) for name, op, tokens in ops.cases((1, 130))]
    torch.cuda.synchronize()
    problems = []

    def loop(shift):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(3 * len(cases)):
                    name, op, x, expected = cases[(i + shift) % len(cases)]
                    if not torch.equal(op(x), expected):
                        problems.append(name)
        except BaseException as problem:  # noqa: BLE001 -- to be reported by the main thread
            problems.append(problem)

    threads = [threading.Thread(target=loop, args=(5 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not problems


def test_tensors_of_another_gpu_than_the_current_one(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(3, 64, device="cuda:1")
    weight, matrix = torch.ones(64, device="cuda:1"), torch.randn(40, 64, device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = minivllm.rms_norm(x, weight)
    parts = minivllm.rms_norm_qkv(x, weight, matrix, 3, 1)
    assert torch.cuda.current_device() == 0
    assert out.device == parts[0].device == x.device
    assert_same_bits(out, minivllm.rms_norm(x.to("cuda:0"), weight.to("cuda:0")))
    with pytest.raises(ValueError, match=r"weight is on cuda:0, expected cuda:1 \(where x is\)"):
        minivllm.rms_norm(x, weight.to("cuda:0"))


def test_a_device_that_does_not_exist(torch):
    with pytest.raises((RuntimeError, ValueError), match=r"cuda:\d+|GPU"):
        minivllm.empty((2, 2), device=f"cuda:{torch.cuda.device_count()}")


def test_the_choice_of_kernels(torch):
    """Few tokens stream the weights, many use the tensor cores; what ran is said."""
    weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    matrix = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    for tokens, part in ((1, "decode"), (2048, "mma")):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        minivllm.rms_norm_qkv(x, weight, matrix, 16, 8)
        ran = minivllm.last_kernel()
        assert part in ran.name and f"tokens={tokens} hidden=1024 outputs=4096" in ran.why
    minivllm.rms_norm_qkv(x.float(), weight.float(), matrix.float(), 16, 8)
    assert minivllm.last_kernel().name.startswith("f32_norm_")


def test_jax_arrays_that_are_still_being_computed(torch):
    framework = next(f for f in frameworks.ALL if f.name == "jax" and f.device == "cuda")
    if reason := framework.why_not():
        pytest.skip(reason)
    jax = frameworks.optional("jax")
    big = framework.tensor(normal((2048, 2048), "f32", "big", scale=0.02), "f32")
    weight = framework.tensor(np.ones(2048), "f32")
    slow = jax.jit(lambda a: jax.lax.fori_loop(0, 30, lambda i, b: jax.numpy.tanh(b @ a), a))
    ready = slow(big).block_until_ready()
    expected = to_float64(minivllm.rms_norm(ready, weight))
    for _ in range(5):
        got = minivllm.rms_norm(slow(big), weight)
        assert framework.is_mine(got)
        assert_same_bits(got + 0.0, expected)


def test_a_device_array_follows_torch_work(torch):
    """An array of ours made from a torch tensor that is still being computed on a side stream."""
    side, late = torch.cuda.Stream(), torch.randn(64, 256, device="cuda")
    expected = to_float64(late)
    x = torch.zeros_like(late)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG // 4)
        x.copy_(late)
        copied = minivllm.to_device(x)
    assert_same_bits(copied, expected)


# ---- the reduced suite that compute-sanitizer runs over: `-m sanitize` ---------------------------------------------

SANITIZED_NORMS = ((3, 33), (2, 1024), (2, 8193))
SANITIZED_PROJECTIONS = ((1, 128), (5, 1024), (17, 64), (70, 256), (4, 37))


@pytest.mark.sanitize
@pytest.mark.rows("rms_norm", "cuda")
def test_norms_under_the_sanitizer(kernel, framework):
    for shape in SANITIZED_NORMS:
        for rounding in ("hf", "fp32"):
            check_norm(
                framework, Norm(shape, short_dtype(kernel.dtype), residual=True, rounding=rounding, kernel=kernel.name)
            )
        check_norm(
            framework,
            Norm(shape, short_dtype(kernel.dtype), kernel=kernel.name, x_layout=UNALIGNED, out_layout=UNALIGNED),
        )


@pytest.mark.sanitize
@pytest.mark.rows("rms_norm_qkv", "cuda")
def test_projections_under_the_sanitizer(kernel, framework):
    ran = 0
    for tokens, hidden in SANITIZED_PROJECTIONS:
        for weights, rounding, residual in (
            ("packed", "hf", True),
            ("packed_t", "fp32", False),
            ("tuple", "hf", False),
            ("in_out", "hf", False),
        ):
            case = QKV((tokens,), hidden, 3, 1, head_dim_for(kernel, 16), short_dtype(kernel.dtype), bias=True,
                       residual=residual, rounding=rounding, weights=weights, kernel=kernel.name)  # fmt: skip
            try:
                check_qkv(framework, case)
            except ValueError as error:
                assert "cannot serve this call" in str(error)
                continue
            ran += 1
    assert ran > 0
