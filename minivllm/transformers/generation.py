"""model.generate(..., custom_generate=minivllm.transformers.generate): the loop of transformers on a Decoder."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMode, MaxLengthCriteria

from .decoder import Decoder

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
CACHES = (None, "dynamic", "static")  # the decoder's cache takes the place of any of these
SERVED_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
ROUND_UP = 256  # capacities are multiples of so many tokens, so that a slightly longer text finds its decoder


class Generation(NamedTuple):
    """What a call of `generate` did, and what ran on the host between its steps.

    on_device: whether the whole loop ran on the device. tokens: how many steps it has returned. seconds: of the call.
    processors, criteria: the classes that ran between the steps; choosing_seconds: of the host in the processors and
    in the choice of the token, stopping_seconds: in the stopping criteria. On a GPU the host only starts such work,
    but each look at a result waits for the step. captures: graphs captured in this call, 0 or 1.
    """

    on_device: bool
    tokens: int
    seconds: float
    processors: tuple[str, ...]
    criteria: tuple[str, ...]
    choosing_seconds: float
    stopping_seconds: float
    captures: int


_kept: weakref.WeakKeyDictionary[Any, Decoder] = weakref.WeakKeyDictionary()
_last = threading.local()


def last_generation() -> Generation | None:
    """What the latest call of `generate` that ended in this thread did, or None."""
    return getattr(_last, "generation", None)


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    token_streamer: Any = None,
    graph: bool | Literal["auto"] = "auto",
    **model_kwargs: Any,
) -> Any:
    """The decoding loop for `model.generate(input_ids, custom_generate=minivllm.transformers.generate, ...)`.

    Greedy search and sampling with the generation config, the logits processors (on float32 logits) and the stopping
    criteria of transformers; the result is that of model.generate: int64 [batch, tokens], or a
    GenerateDecoderOnlyOutput with scores and logits where they are asked for, and no past_key_values, as the cache is
    the decoder's. Greedy search with nothing but limits of length and ends of sequences runs on the device, whatever
    else between the steps; see last_generation().

    token_streamer: a streamer of transformers, which does not hand on its `streamer`. graph: as Decoder. The decoder of
    a model is kept as long as the model is, and is replaced where a call needs another batch size or more tokens.

    NotImplementedError: beams, assistants and options that are not served, by name, before anything runs. ValueError,
    RuntimeError: as Decoder.
    """
    _check(model, generation_config, synced_gpus, model_kwargs)
    started = time.perf_counter()
    batch, length = input_ids.shape
    limit = min((c.max_length for c in stopping_criteria if hasattr(c, "max_length")), default=None)
    limit = generation_config.max_length if limit is None else limit
    if limit is None or limit <= length:
        raise ValueError(f"generate: the text may have {limit} tokens, the prompt has {length}: raise max_new_tokens")
    mask = model_kwargs.get("attention_mask")
    _check_positions(model_kwargs.get("position_ids"), mask, input_ids)
    decoder = _decoder_of(model, batch, limit, graph)
    captures, streamer = decoder.captures, token_streamer if streamer is None else streamer
    if streamer is not None:
        streamer.put(input_ids.cpu())
    loop = _Loop(decoder, input_ids, mask, logits_processor, stopping_criteria, generation_config, streamer)
    on_device = loop.needs_no_host()
    ids = loop.on_device(limit - length) if on_device else loop.on_host()
    if streamer is not None:
        streamer.end()
    _last.generation = Generation(
        on_device, ids.shape[1] - length, time.perf_counter() - started,
        tuple(type(x).__name__ for x in logits_processor), tuple(type(x).__name__ for x in stopping_criteria),
        loop.choosing, loop.stopping, decoder.captures - captures)  # fmt: skip
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=ids, scores=loop.scores, logits=loop.logits)
    return ids


class _Loop:
    """One text: `scores` and `logits` are tuples of float32 [batch, vocabulary] where they are asked for, else None."""

    def __init__(
        self, decoder: Decoder, ids: Tensor, mask: Tensor | None, processors: Any, criteria: Any, config: Any,
        streamer: Any
    ) -> None:  # fmt: skip
        self.decoder, self.ids, self.mask, self.config, self.streamer = decoder, ids, mask, config, streamer
        self.processors, self.criteria = processors, criteria
        is_dict = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if is_dict and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if is_dict and config.output_logits else None
        self.choosing = self.stopping = 0.0
        self.ends = [end for c in criteria if type(c) is EosTokenCriteria for end in c.eos_token_id.flatten().tolist()]
        self.may_end = any(hasattr(c, "eos_token_id") for c in criteria)

    def needs_no_host(self) -> bool:
        """Whether the device can do all of it: what it knows is the largest logit, ends of sequences and a number."""
        known = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in self.criteria)
        recorded = self.scores is not None or self.logits is not None
        return known and not self.config.do_sample and not self.processors and not recorded

    def on_device(self, new_tokens: int) -> Tensor:
        pad = self.config._pad_token_tensor
        columns = []
        for tokens in self.decoder.generate(
            self.ids, new_tokens, self.mask, eos_token_id=self.ends, pad_token_id=0 if pad is None else int(pad)
        ):
            columns.append(tokens)
            if self.streamer is not None:
                self.streamer.put(tokens)
        return torch.cat([self.ids, torch.stack(columns, 1).to(self.ids.device)], 1)

    @torch.no_grad()
    def on_host(self) -> Tensor:
        """As GenerationMixin._sample of transformers: the same operations in one order, and so the same samples."""
        ids, pad = self.ids, self.config._pad_token_tensor
        unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
        logits = self.decoder.prefill(ids, self.mask)
        while True:
            start = time.perf_counter()
            raw = logits.to(copy=True, dtype=torch.float32)
            scores = self.processors(ids, raw)
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (raw,)
            if self.config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if self.may_end:
                tokens = tokens * unfinished + pad * (1 - unfinished)
            ids = torch.cat([ids, tokens[:, None]], 1)
            chosen = time.perf_counter()
            unfinished = unfinished & ~self.criteria(ids, self.scores)
            is_over = not bool(unfinished.any())
            self.choosing += chosen - start
            self.stopping += time.perf_counter() - chosen
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            if is_over:
                return ids
            logits = self.decoder.step(tokens)


def _check(model: Any, config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """NotImplementedError that names the first thing that is not served."""
    unserved = {
        f"generation mode {config.get_generation_mode().value!r}": config.get_generation_mode() not in MODES,
        "num_beams": (config.num_beams or 1) > 1,
        "synced_gpus": synced_gpus,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "guidance_scale": config.guidance_scale not in (None, 1, 1.0),
        "prefill_chunk_size": config.prefill_chunk_size,
        f"cache_implementation={config.cache_implementation!r}": config.cache_implementation not in CACHES,
        "use_cache=False": model_kwargs.get("use_cache") is False,
    }
    unserved |= {name: value is not None for name, value in model_kwargs.items() if name not in SERVED_ARGUMENTS}
    for name, is_asked_for in unserved.items():
        if is_asked_for:
            raise NotImplementedError(
                f"generate: {name} is not served by minivllm.transformers.generate; leave it out, or call "
                "model.generate without custom_generate"
            )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise NotImplementedError(
            f"generate: past_key_values holds {int(cache.get_seq_length())} tokens already, and the decoder has a "
            "cache of its own: hand over the whole text without past_key_values"
        )
    if cache is not None and getattr(cache, "_is_user_defined", False):
        raise NotImplementedError(
            "generate: past_key_values would stay empty, as the decoder has a cache of its own: leave it out"
        )


def _check_positions(positions: Tensor | None, mask: Tensor | None, ids: Tensor) -> None:
    if positions is None:
        return
    real = torch.ones_like(ids) if mask is None else mask.long()
    expected = (real.cumsum(-1) - 1).masked_fill(real == 0, 0)
    if positions.shape[-1] != ids.shape[1] or bool(((positions != expected) & (real != 0)).any()):
        raise NotImplementedError("generate: position_ids other than those of attention_mask are not served")


def _decoder_of(model: Any, batch: int, length: int, graph: bool | Literal["auto"]) -> Decoder:
    """The decoder that is kept for this model, if it will do, or a new one in its place."""
    decoder = _kept.get(model)
    if decoder is not None:
        wanted = decoder.device.type == "cuda" if graph == "auto" else graph
        serves = decoder.batch_size == batch and decoder.max_length >= length and decoder.uses_graph == wanted
        if serves and decoder.serves(model):
            return decoder
        del _kept[model], decoder  # its memory goes before that of the next one comes
    decoder = Decoder(model, batch, -(-length // ROUND_UP) * ROUND_UP, graph)
    decoder.hold_weakly()
    _kept[model] = decoder
    return decoder
