"""Qwen3 without a framework around it: minivllm's decoder layers, a checkpoint directory of Hugging Face, greedy text.

python -m examples.qwen3 /path/to/checkpoint "Once upon a time" [--max-new-tokens 200] [--device cuda]

The names of the modules are those of the checkpoint, so that its tensors load as they are. A text's keys and values lie
in caches of fixed size, of which a step reads as many rows as the text has tokens.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import minivllm
from minivllm.nn import DecoderLayer, RMSNorm


class Model(nn.Module):
    """The decoder: embedding, layers and the final norm."""

    def __init__(self, config):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(
            DecoderLayer(
                hidden, config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"],
                config["head_dim"], eps, bias=config["attention_bias"], qk_norm=True, static_weights=True)
            for _ in range(config["num_hidden_layers"]))  # fmt: skip
        self.norm = RMSNorm(hidden, eps)


class Qwen3(nn.Module):
    """A Qwen3 with its caches for `batch` texts of at most `max_length` tokens. config: its config.json."""

    def __init__(self, config):
        super().__init__()
        if config.get("use_sliding_window") or config["hidden_act"] != "silu":
            raise ValueError("Qwen3: sliding windows and activations other than silu are not in this example")
        self.config, self.model = config, Model(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.caches = []

    def start(self, batch, max_length):
        """Empty caches, and the rows of the rotary embedding."""
        config, weight = self.config, self.lm_head.weight
        shape = (batch, config["num_key_value_heads"], max_length, config["head_dim"])
        self.caches = [[weight.new_zeros(shape) for _ in "kv"] for _ in self.model.layers]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"Qwen3: rotary embeddings of type {rope['rope_type']} are not in this example")
        theta = rope.get("rope_theta", config.get("rope_theta"))
        frequencies = theta ** -(torch.arange(0, config["head_dim"], 2, device=weight.device) / config["head_dim"])
        angles = torch.arange(max_length, device=weight.device)[:, None] * frequencies.repeat(2)
        self.cos, self.sin = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)

    def forward(self, ids, positions=None):
        """The logits [batch, vocabulary] after ids [batch, tokens]: a prompt, or one token at each of `positions`."""
        x = self.model.embed_tokens(ids)
        rows = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions[:, None]
        cos, sin = self.cos[rows], self.sin[rows]
        for layer, cache in zip(self.model.layers, self.caches):
            x = layer(x, cos, sin, *cache, positions)
        norm = self.model.norm
        return minivllm.rms_norm_linear(
            x[:, -1], norm.weight, self.lm_head.weight, norm.eps, weight_layout="out_in", static_weights=True
        )


def load(directory, device="cpu"):
    """The model of a checkpoint directory, in the dtype of its tensors."""
    directory = Path(directory)
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path, device=str(device))
    with torch.device("meta"):
        model = Qwen3(json.loads((directory / "config.json").read_text()))
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])  # where the two are one
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@torch.inference_mode()
def generate(model, ids, max_new_tokens, ends=()):
    """Greedy decoding of prompts of one length, ids [batch, tokens]; yields the tokens [batch] of each step, and stops
    where all of them are in `ends`."""
    batch, tokens = ids.shape
    model.start(batch, tokens + max_new_tokens)
    positions = torch.full((batch,), tokens, device=ids.device)
    chosen = model(ids).argmax(-1)
    for step in range(max_new_tokens):
        yield chosen
        if step + 1 == max_new_tokens or all(token in ends for token in chosen.tolist()):
            return
        chosen = model(chosen[:, None], positions).argmax(-1)
        positions += 1


def main():
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = load(args.checkpoint, args.device)
    ids = torch.tensor([tokenizer(args.text)["input_ids"]], device=args.device)
    tokens = [int(token) for token in generate(model, ids, args.max_new_tokens, {tokenizer.eos_token_id})]
    print(args.text + tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
