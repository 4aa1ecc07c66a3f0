"""A small engine: Qwen3 on paged caches, with continuous batching, in the way that nano-vllm and vLLM have it.

Every layer has a pool of pages for keys and values. A sequence has a list of pages, its row of the block table: all
that it will ever need, which it gives back when it is done. In every turn the engine takes in as many waiting prompts
as there are places in the batch and pages in the pool, then decodes one token for each sequence.

    python -m examples.paged /path/to/checkpoint "Once upon a time" "The sea" [--max-new-tokens 50] [--device cuda]
"""

import argparse
from dataclasses import dataclass, field

import torch
from torch.nn.functional import embedding, scaled_dot_product_attention

import minivllm

PAGE = 16  # tokens


@dataclass
class Sequence:
    tokens: list[int]
    wanted: int  # how many tokens it will have in the end
    pages: list[int] = field(default_factory=list)


class Qwen3:
    """A model of transformers, computed with its weights by minivllm; gate and up are packed in one matrix.

    model: a Qwen3ForCausalLM. pages: of each layer's pool, [pages, PAGE, kv_heads, head_dim] for keys and for values.
    """

    def __init__(self, model, pages):
        config = self.config = model.config
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.embeddings, self.norm, self.head = weight, model.model.norm.weight, model.get_output_embeddings().weight
        self.layers = [self.weights_of(layer) for layer in model.model.layers]
        shape = (pages, PAGE, config.num_key_value_heads, config.head_dim)
        self.caches = [[weight.new_zeros(shape) for _ in range(2)] for _ in self.layers]
        places = torch.arange(pages * PAGE, dtype=torch.float32, device=self.device)
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=self.device) / config.head_dim
        angles = (places[:, None] * config.rope_parameters["rope_theta"] ** -pairs).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    @staticmethod
    def weights_of(layer):
        attention, mlp = layer.self_attn, layer.mlp
        return {
            "input_norm": layer.input_layernorm.weight,
            "qkv": tuple(linear.weight for linear in (attention.q_proj, attention.k_proj, attention.v_proj)),
            "heads": {"q_norm_weight": attention.q_norm.weight, "k_norm_weight": attention.k_norm.weight},
            "o": attention.o_proj.weight,
            "post_norm": layer.post_attention_layernorm.weight,
            "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down": mlp.down_proj.weight,
        }

    def forward(self, ids, positions, attend):
        """The logits [tokens, vocabulary] behind some tokens. attend(q, k, v, cache, options) -> like q."""
        config, eps = self.config, self.config.rms_norm_eps
        places = {"cos": self.cos[positions], "sin": self.sin[positions], "eps": eps}
        x = embedding(ids, self.embeddings)
        for w, cache in zip(self.layers, self.caches):
            q, k, v = minivllm.rms_norm_qkv(
                x, w["input_norm"], w["qkv"], config.num_attention_heads, config.num_key_value_heads, eps,
                head_dim=config.head_dim, weight_layout="out_in")  # fmt: skip
            out = attend(q, k, v, cache, places | w["heads"])
            x = minivllm.linear_add(out.flatten(1), w["o"], x, weight_layout="out_in")
            h = minivllm.rms_norm_gate_up(x, w["post_norm"], w["gate_up"], eps, weight_layout="out_in")
            x = minivllm.linear_add(h, w["down"], x, out=x, weight_layout="out_in")
        return minivllm.rms_norm_linear(x, self.norm, self.head, eps, weight_layout="out_in")

    def prefill(self, sequence):
        """The first new token of a prompt, whose keys and values go to the pages of the sequence."""
        positions = torch.arange(len(sequence.tokens), device=self.device)
        pages = torch.tensor(sequence.pages, device=self.device)
        slots = pages[positions // PAGE] * PAGE + positions % PAGE

        def attend(q, k, v, cache, options):
            q, k = minivllm.qk_norm_rope(
                q, k, **options, v=v, key_cache=cache[0], value_cache=cache[1], slots=slots, cache_layout="NHD"
            )
            heads = (part.transpose(0, 1)[None] for part in (q, k, v))
            return scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        ids = torch.tensor(sequence.tokens, device=self.device)
        return int(self.forward(ids, positions, attend)[-1].argmax())

    def decode(self, sequences):
        """The next token of each sequence, whose last one is not in the cache yet."""
        width = max(len(sequence.pages) for sequence in sequences)
        rows = [sequence.pages + [-1] * (width - len(sequence.pages)) for sequence in sequences]
        table = torch.tensor(rows, dtype=torch.int32, device=self.device)
        positions = torch.tensor([len(sequence.tokens) - 1 for sequence in sequences], device=self.device)

        def attend(q, k, v, cache, options):
            return minivllm.decode_attention(
                q, k, v, *cache, positions, **options, block_table=table, cache_layout="NHD"
            )

        ids = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=self.device)
        return self.forward(ids, positions, attend).argmax(-1).tolist()


@torch.inference_mode()
def generate(model, prompts, new_tokens, batch_size=4, pages=64):
    """Greedy decoding of lists of tokens: for each its new tokens. new_tokens: a number for each prompt, >= 1."""
    engine, free = Qwen3(model, pages), list(range(pages))
    everyone = [Sequence(list(prompt), len(prompt) + new) for prompt, new in zip(prompts, new_tokens, strict=True)]
    waiting, running = list(everyone), []
    while waiting or running:
        while waiting and len(running) < batch_size and -(-waiting[0].wanted // PAGE) <= len(free):
            sequence = waiting.pop(0)
            sequence.pages = [free.pop() for _ in range(-(-sequence.wanted // PAGE))]
            sequence.tokens.append(engine.prefill(sequence))
            running.append(sequence)
        if not running:
            raise ValueError(f"generate: {waiting[0].wanted} tokens need more than {pages} pages of {PAGE}")
        unfinished = [sequence for sequence in running if len(sequence.tokens) < sequence.wanted]
        for sequence, token in zip(unfinished, engine.decode(unfinished) if unfinished else ()):
            sequence.tokens.append(token)
        for sequence in [sequence for sequence in running if len(sequence.tokens) >= sequence.wanted]:
            running.remove(sequence)
            free += sequence.pages
    return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(everyone, prompts)]


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto").to(args.device).eval()
    prompts = [tokenizer(text)["input_ids"] for text in args.text]
    pages = sum(-(-(len(prompt) + args.max_new_tokens) // PAGE) for prompt in prompts)
    for text, new in zip(args.text, generate(model, prompts, [args.max_new_tokens] * len(prompts), pages=pages)):
        print(text + tokenizer.decode(new, skip_special_tokens=True))


if __name__ == "__main__":
    main()
