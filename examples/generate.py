"""A checkpoint directory in, text out: a model of transformers on minivllm's ops, decoded token by token.

python -m examples.generate /path/to/checkpoint "Once upon a time" [--max-new-tokens 200] [--device cuda]
"""

import argparse

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import BaseStreamer

import minivllm.transformers


class Progress(BaseStreamer):
    """A bar on stderr: transformers hands over the prompt first, then the tokens one by one."""

    def __init__(self, total):
        self.bar = tqdm(total=total, unit="token", initial=-1)

    def put(self, value):
        self.bar.update()

    def end(self):
        self.bar.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto").to(args.device).eval()
    minivllm.transformers.apply(model)
    prompt = tokenizer(args.text, return_tensors="pt", return_token_type_ids=False).to(args.device)
    tokens = model.generate(
        **prompt, max_new_tokens=args.max_new_tokens, custom_generate=minivllm.transformers.generate,
        token_streamer=Progress(args.max_new_tokens))  # fmt: skip
    print(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    print(minivllm.transformers.last_generation())


if __name__ == "__main__":
    main()
