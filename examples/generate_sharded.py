"""A checkpoint directory in, text out, by a model that is cut over the processes of torchrun: each has its heads of the
attention and its part of the MLP, on a GPU of its own over NCCL, or on the CPU over gloo.

torchrun --nproc-per-node 2 -m examples.generate_sharded /path/to/checkpoint "Once upon a time" [--max-new-tokens 200]
"""

import argparse
import gc

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import minivllm.transformers
from examples.tensor_parallel import BACKENDS, join


def generate(checkpoint, text, max_new_tokens, device):
    """The text that follows, the same on every rank."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    minivllm.transformers.shard(model)
    minivllm.transformers.apply(model.to(device))
    torch.manual_seed(0)  # where the checkpoint asks for samples, all ranks draw the same ones
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(device)
    tokens = model.generate(
        **prompt, max_new_tokens=max_new_tokens, custom_generate=minivllm.transformers.generate)  # fmt: skip
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--device", choices=BACKENDS, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rank, device = join(args.device)
    text = generate(args.checkpoint, args.text, args.max_new_tokens, device)
    if rank == 0:
        print(text)
        print(minivllm.transformers.last_generation())
    gc.collect()  # the model, and with it the graph of its decoder, for which NCCL would wait
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
