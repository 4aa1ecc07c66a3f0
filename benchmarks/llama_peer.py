"""llama.cpp on the CPU: the same Qwen3 with the same weights, where llama-cpp-python and gguf are installed.

The weights go into a temporary GGUF file in their own dtype, the norms in float32, and llama.cpp maps it; the keys and
values are float16, which is its default. It runs on as many threads as minivllm. A step is one token decoded, and the
choice of the next one from its logits.
"""

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(model):
    """(its name in GGUF, a parameter), for all of the model."""
    yield "token_embd.weight", model.get_input_embeddings().weight
    yield "output_norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    for number, layer in enumerate(model.model.layers):
        for name, short in NAMES.items():
            yield f"blk.{number}.{short}.weight", layer.get_submodule(name).weight


def write(model, path: Path) -> None:
    """A GGUF file of a Qwen3, without a tokenizer."""
    import gguf
    import torch

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, parameter in tensors(model):
        if parameter.dim() == 2 and parameter.dtype == torch.bfloat16:
            raw = parameter.detach().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, parameter.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A Qwen3 in llama.cpp, for one sequence."""

    def __init__(self, model, rows: int):
        import llama_cpp

        import minivllm

        if model.config.model_type != "qwen3":
            raise NotImplementedError(f"llama.cpp: only Qwen3 is written to GGUF, not {model.config.model_type}")
        self.lib, self.vocabulary = llama_cpp, model.config.vocab_size
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            write(model, path)
            self.model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params()
            )
        if not self.model:
            raise RuntimeError("llama.cpp does not load the model that was written")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = rows
        options.n_threads = options.n_threads_batch = minivllm.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def feed(self, tokens: list[int]):
        """The float32 logits after some tokens, in llama.cpp's memory: they hold until the next call."""
        import numpy

        array = (self.lib.llama_token * len(tokens))(*tokens)  # the batch only points to it
        if status := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode gave {status}")
        return numpy.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def rewind(self, length: int) -> None:
        """Forgets every token beyond `length`."""
        self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)

    def __del__(self):
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)


def step(model, prompt: list[int], room: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(a step behind the prompt, what takes it back there)"""
    llama = Llama(model, len(prompt) + room)
    last = [int(llama.feed(prompt).argmax())]

    def advance() -> None:
        last[0] = int(llama.feed(last).argmax())

    return advance, lambda: llama.rewind(len(prompt))
