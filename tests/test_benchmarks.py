"""The benchmarks of ops on the CPU, where they have neither graphs nor a floor, and the tables of what they measure."""

import json

import pytest
from processes import PACKAGE, ROOT, on_ranks, run

pytest.importorskip("torch", reason="the benchmarks need torch, which is not installed")


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def rows_of(path, op, *options):
    """The rows of a quick run."""
    arguments = ("-m", "benchmarks", op, "--device", "cpu", "--quick", "--json", str(path), *options)
    done = run(None, arguments=arguments, paths=(PACKAGE, ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())["rows"]


def test_decode_attention(tmp_path):
    rows = rows_of(
        tmp_path / "attention.json", "decode_attention", "--shapes", "4x2", "--tokens", "2", "--dtype", "f32"
    )
    assert [(row["context"], row["variant"]) for row in rows] == [
        (keys, variant) for keys in (512, 4096) for variant in ("minivllm", "minivllm not static", "torch")
    ]
    for row in rows:
        assert row["us"] > 0 and row["tokens"] == 2 and row["shape"] == "4x2"
        assert row["bytes"] > 2 * 2 * 2 * row["context"] * 128 * 4  # keys and values of two heads of two sequences
        assert row.get("kernel", "").startswith("f32_") == row["variant"].startswith("minivllm")
    from benchmarks.results import Results

    assert len(Results(tmp_path).of("cpu", "decode_attention")) == 2  # the contexts are cases of their own


def test_the_table_of_decode_attention(tmp_path):
    """From a run that says that it was on a GPU."""
    from benchmarks.results import Results
    from benchmarks.tables import attention

    path = tmp_path / "attention.json"
    rows_of(path, "decode_attention", "--shapes", "4x2", "--dtype", "f32")
    run_of_gpu = json.loads(path.read_text())
    run_of_gpu["environment"] |= {"device": "cuda", "gpu": "NVIDIA H200", "cuda": "13.0"}
    path.write_text(json.dumps(run_of_gpu))
    text = attention(Results(tmp_path))
    assert "| 4 / 2 | 1 | 512 | f32 | H200 | **" in text and "| 4 / 2 | 1 | 4,096 |" in text


def needs_transformers():
    pytest.importorskip("transformers", reason="whole models are those of transformers, which is not installed")


TINY = ("--shapes", "tiny-qwen3", "--layers", "2", "--contexts", "40", "--tokens", "2")


def test_step(tmp_path):
    needs_transformers()
    rows = rows_of(tmp_path / "step.json", "step", *TINY, "--dtype", "f32", "--memory", "0.0015")
    by_variant = {row["variant"]: row for row in rows}
    each = 2 * (40 + 512) * 2 * 2 * 2 * 32 * 4  # keys and values of two heads of two layers
    assert all(row["context"] == 40 and row["cache_bytes"] == each // (40 + 512) * 40 for row in rows)
    rotary = 2 * (40 + 512) * 32 * 4
    assert each + rotary < by_variant["minivllm decoder"]["memory_bytes"] < 1.1 * (each + rotary)
    assert "left out" in by_variant["transformers eager"]["error"]  # the second cache


@pytest.mark.parametrize("op,variants", [
    ("step", ["minivllm decoder", "transformers eager", "transformers decoder", "minivllm eager"]),
    ("first_token", ["minivllm decoder", "transformers eager", "minivllm eager"]),
    ("generate", ["transformers", "minivllm", "minivllm decoder"]),
])  # fmt: skip
def test_whole_models(tmp_path, op, variants):
    needs_transformers()
    from benchmarks.results import Results
    from benchmarks.tables import step_page

    rows = rows_of(tmp_path / "rows.json", op, *TINY)
    assert [row["variant"] for row in rows] == variants
    assert all(row["us"] > 0 and row["context"] == 40 for row in rows)
    assert "| tiny-qwen3, 2 layers | bf16 | 2 | 40 | " in step_page(Results(tmp_path))


@pytest.mark.parametrize("shape", ["16", "16x", "0x8", "16x5", "qwen3-0.6b"])
def test_shapes_of_decode_attention_are_head_counts(shape):
    from benchmarks.__main__ import shape_error

    assert shape in shape_error("decode_attention", ["16x8", shape])
    assert shape_error("decode_attention", ["16x8", "7x1"]) is None


def test_model_accuracy(tmp_path):
    needs_transformers()
    from benchmarks.results import Results
    from benchmarks.tables import model_accuracy

    rows = rows_of(tmp_path / "accuracy.json", "model_accuracy", "--shapes", "tiny-qwen3", "--layers", "2")
    of = {(row["kind"], row["variant"]): row for row in rows}
    ours, plain = (of["8 prompts of 3 to 120, 8 steps", variant] for variant in ("minivllm", "transformers"))
    assert ours["choices"] == 8 * (1 + 8) and plain["difference"] == 0
    assert 0 < ours["mean_error"] < plain["mean_error"] and ours["difference"] < ours["difference_bound"] < 0
    cache = of["keys and values", "minivllm"]
    assert all(len(cache[column]) == 2 and min(cache[column]) > 0 for column in ("keys_error", "values_error"))
    exact = (
        "logits of the same batch once more",
        "logits before apply and after undo",
        "tokens of the rollouts once more",
    )
    assert all(of[kind, "minivllm"]["equal"] == 1 for kind in exact)
    assert of["logits of each alone and in a batch of 4", "minivllm"]["apart"] < plain["mean_error"]
    text = model_accuracy(Results(tmp_path))
    assert text.count("| tiny-qwen3, 2 layers | bf16 |") == 5 + 1 + 1 + 4


def test_the_table_of_sharded_steps(tmp_path):
    """A row of each model and batch, with the command of torchrun below."""
    from benchmarks.results import Results
    from benchmarks.tables import sharded_steps

    case = {"op": "sharded_step", "shape": "qwen3-8b", "tokens": 1, "dtype": "bf16", "mode": "step", "ranks": 2}
    case |= {"bytes": 1, "context": 512}
    times = {"minivllm alone": 4500.0, "minivllm sharded": 3000.0, "sums alone": 700.0}
    environment = {"device": "cuda", "gpu": "NVIDIA H200", "cuda": "13.0", "packages": {}, "git": {"sha": "0123456789"}}
    written = {"date": "2026-01-01T00:00:00Z", "command": "torchrun", "environment": environment}
    written["rows"] = [case | {"variant": variant, "us": us} for variant, us in times.items()]
    (tmp_path / "sharded.json").write_text(json.dumps(written))
    text = sharded_steps(Results(tmp_path))
    assert "| qwen3-8b | 1 | 2 x H200 | **3000** | 333 | 4500 | 1.50x | 700 |" in text and "commit 0123456" in text


@pytest.mark.gpu
def test_sharded_steps(tmp_path, cuda_torch):
    if cuda_torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    path = tmp_path / "sharded.json"
    on_ranks("-m", "benchmarks.sharded_step", "--models", "tiny-qwen3", "--tokens", "1", "2", "--json", str(path))
    written = json.loads(path.read_text())
    assert (
        written["command"] == "torchrun --nproc-per-node 2 -m benchmarks.sharded_step --models tiny-qwen3 --tokens 1 2"
    )
    assert [(row["tokens"], row["variant"]) for row in written["rows"]] == [
        (batch, variant) for batch in (1, 2) for variant in ("minivllm alone", "minivllm sharded", "sums alone")
    ]
    assert all(row["us"] > 0 and row["ranks"] == 2 and row["shape"] == "tiny-qwen3" for row in written["rows"])
