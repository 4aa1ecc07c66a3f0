"""What test_shard.py compares: the results of a whole model, and as a script of torchrun those of a model on its ranks.

torchrun --nproc-per-node 2 tests/sharded_models.py cpu FOLDER    saves FOLDER/<rank>.pt
"""

import gc
import sys

import torch
import torch.distributed as dist
from transformer_models import FAMILIES, model_of, prompt

import minivllm.transformers
from minivllm.testing.models import causal_lm
from minivllm.transformers import Decoder

TINY = {
    "qwen2": ("tiny-qwen2", {}),
    "qwen3": ("tiny-qwen3", {}),
    "llama": ("tiny-llama", {}),
    "llama with a key head for both ranks": ("tiny-llama", {"num_key_value_heads": 1}),
}
BF16 = ("qwen3", "granite", "gemma3")
CASES = [(kind, "float32") for kind in (*TINY, *FAMILIES)] + [(kind, "bfloat16") for kind in BF16]
STEPS, NEW = 3, 8  # steps with given tokens, tokens that are chosen


def whole_model(kind, dtype):
    """The same on every process."""
    if kind in FAMILIES:
        return model_of(kind, getattr(torch, dtype))
    name, changes = TINY[kind]
    return causal_lm(name, dtype, **changes)


@torch.no_grad()
def results_of(model):
    """Logits of a prompt and of fewer tokens, of a Decoder's prefill and steps, and what generate chooses."""
    ids = prompt(6, 14).to(model.device)
    decoder = Decoder(model, len(ids), 32)
    steps = [decoder.prefill(ids[:, :-STEPS]).clone()]
    steps += [decoder.step(token).clone() for token in ids[:, -STEPS:].unbind(1)]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    chosen = model.generate(ids, custom_generate=minivllm.transformers.generate, **options)[:, ids.shape[1] :]
    logits = {"many": model(ids).logits, "few": model(ids[:2]).logits, "decoder": torch.stack(steps, 1)}
    return {name: x.cpu() for name, x in logits.items()} | {"chosen": chosen.cpu(), "captures": decoder.captures}


def main():
    from examples.tensor_parallel import join

    device, folder = sys.argv[1:]
    rank, here = join(device)
    saved = {}
    for kind, dtype in CASES:
        model = whole_model(kind, dtype).to(here)
        minivllm.transformers.shard(model)
        plain = results_of(model)
        report = minivllm.transformers.apply(model)
        applied = results_of(model)
        assert not report.left_alone and not report.fallbacks, report
        saved[kind, dtype] = {"plain": plain, "applied": applied}
    torch.save(saved, f"{folder}/{rank}.pt")
    del model, report  # with the graphs, for which destroy_process_group would wait
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
