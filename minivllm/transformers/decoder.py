"""Token by token on fixed memory: a Decoder owns the caches of a model and, on a GPU, one CUDA graph of its step.

What the step computes is in `Decoder._forward`, what follows the logits on the device in `Decoder._choose`; cache.py
holds the caches, served.py says which models can be served. docs/decoder.md is for users.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import _C as ops
from .cache import Cursor, new_cache
from .code import is_intercepted
from .prompt import MOST_PRODUCTS, PromptGraphs, padded
from .rotary import RotaryRows
from .served import Places, check_model, fingerprint

LOOK_EVERY = 16  # tokens between two looks of the host at what a GPU has chosen
WARM_UPS = 2  # forwards before a capture, in which libraries allocate what they keep


class Decoder:
    """Decodes up to `batch_size` sequences of at most `max_length` tokens each with a causal language model.

    model: one of the families of `apply`, for causal language modelling of transformers, in eval mode on one device;
    minivllm.transformers.apply may have been called on it. Its weights are used in place. graph: "auto" captures the
    step into a CUDA graph where the model is on a GPU, once for all lengths; True asks for that, False never does.

    The caches are the decoder's, and `memory` says how large they are. One decoder decodes one batch at a time: prefill
    starts the next. A decoder is not for two threads at once. Everything runs without gradients.

    TypeError: model is no PreTrainedModel. ValueError: an argument. NotImplementedError: a model that is not served,
    by name. RuntimeError: graph=True without a GPU, or a model in training mode.
    """

    def __init__(
        self, model: Any, batch_size: int = 1, max_length: int = 4096, graph: bool | Literal["auto"] = "auto"
    ) -> None:
        for name, number in (("batch_size", batch_size), ("max_length", max_length)):
            if type(number) is not int or number < 1:
                raise ValueError(f"Decoder: {name} is {number!r}, expected a whole number >= 1")
        if graph not in (True, False, "auto"):
            raise ValueError(f"Decoder: graph is {graph!r}, expected True, False or 'auto'")
        shape = check_model(model)
        self._model: Callable[[], Any] = lambda: model
        self.batch_size, self.max_length, self.device = batch_size, max_length, shape.weight.device
        if graph is True and self.device.type != "cuda":
            raise RuntimeError(f"Decoder: graph=True needs the model on a CUDA device, it is on {self.device}")
        self.uses_graph = self.device.type == "cuda" if graph == "auto" else graph
        self.captures, self.replays = 0, 0
        self._shape, self._cursor = shape, Cursor(RotaryRows(max_length))
        self._graph: Any = None
        self._graph_logits: Any = None  # where its replays leave them
        self._captured_from: Any = None
        self._places: Places | None = None
        elements = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        self._prompts = PromptGraphs(int(MOST_PRODUCTS / elements), self.device)
        self._batch, self._length = 0, 0  # sequences in use, rows of the longest; no sequence before a prefill
        self._owner: object = None  # whose tokens come next: set anew by each prefill, generate and step

        def integers(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=self.device)

        with torch.inference_mode(False), torch.no_grad():
            weight = shape.weight
            self._cache = new_cache(
                batch_size, max_length, shape.heads, shape.head_dim, shape.sliding, weight, self._cursor
            )
            self._prompt_logits = torch.zeros(batch_size, shape.vocabulary, dtype=weight.dtype, device=self.device)
            self._step_logits = self._prompt_logits  # of the last step, wherever it has left them
            self._tokens, self._pad = integers(batch_size), integers(1)
            # The row of each sequence's next token, and how many tokens have been chosen for it: both grow with each
            # step.
            self._positions, self._counts = integers(batch_size), integers(batch_size)
            self._finished = torch.zeros(batch_size, dtype=torch.bool, device=self.device)
            self._ends = torch.zeros(shape.vocabulary, dtype=torch.bool, device=self.device)  # by token
            self._history = integers(batch_size, max_length + 1)
            self._keys = torch.arange(max_length, device=self.device)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the decoder holds beside the model's weights, by what they are for."""
        layers = self._cache.layers
        counters = (self._positions, self._counts)
        mine = (self._tokens, self._pad, *counters, self._finished, self._ends, self._history)
        return {
            "keys and values": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
            "logits": self._prompt_logits.nbytes,
            "rotary embedding": self._cursor.rotary.nbytes,
            "tokens and flags": sum(x.nbytes for x in (*mine, self._keys, *(layer.sequences for layer in layers))),
        }

    def hold_weakly(self) -> None:
        """From now on the decoder does not keep its model alive, so that a table of decoders by model may hold it."""
        self._model = weakref.ref(self._model())

    def serves(self, model: Any) -> bool:
        """Whether this is its model still, with the shape, device and attention that it had."""
        shape, mine = check_model(model), self._shape
        return shape.weight is mine.weight and shape[1:] == mine[1:] and self._is_in_place(model)

    def _is_in_place(self, model: Any) -> bool:
        return all(x.device == self.device for x in (self._shape.weight, model.get_input_embeddings().weight))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Starts anew with these prompts; returns the logits of their last tokens, [batch, vocabulary], in the dtype
        of the model.

        input_ids: int64 or int32 [batch, tokens] on the model's device. attention_mask: [batch, tokens] of 0 and 1 for
        prompts padded on the left or on the right; None: no padding. Only tokens are stored, none of the padding.
        ValueError: shapes, dtypes, devices, a mask with holes, more than the decoder holds.
        """
        model = self._checked_model("prefill")
        ids, starts, lengths = self._checked_prompt(input_ids, attention_mask)
        self._cursor.rotary.refresh()
        if self.uses_graph and not (self._places and self._places.hold()):
            self._capture(model)
        self._read_prompt(model, ids, starts, lengths)
        # Whether the graphs still are of this model takes the host a millisecond, while a GPU works on the prompt.
        if self.uses_graph and self._captured_from != fingerprint(model):
            self._capture(model)  # which writes to the caches
            self._read_prompt(model, ids, starts, lengths)
        self._batch, self._length, self._owner = len(ids), max(lengths), object()
        return self._prompt_logits[: self._batch]

    def _read_prompt(self, model: Any, ids: Tensor, starts: list[int], lengths: list[int]) -> None:
        if min(lengths) == max(lengths):
            parts = [row[start : start + lengths[0]] for row, start in zip(ids, starts)]
            self._unpadded_prompt(model, torch.stack(parts) if max(starts) else ids[:, : lengths[0]])
        else:
            self._padded_prompt(model, ids, starts, lengths)

    def _padded_prompt(self, model: Any, ids: Tensor, starts: list[int], lengths: list[int]) -> None:
        """Prompts of different lengths: padded on the left whatever they were, so that all last tokens are in the last
        column."""
        longest = max(lengths)
        columns = torch.arange(longest, device=self.device)
        numbers = torch.tensor([starts, lengths], device=self.device)
        shift = numbers[0] + numbers[1] - longest
        ids = ids.gather(1, (columns + shift[:, None]) % ids.shape[1])
        rows = columns - (longest - numbers[1][:, None])
        mask = (rows >= 0).long()
        sequences, where = mask.nonzero(as_tuple=True)
        self._cursor.prompt = (sequences, where, rows[sequences, where])
        self._take_prompt(model, ids, mask, rows.clamp_min(0), mask > 0, numbers[1], 1)

    def _unpadded_prompt(self, model: Any, ids: Tensor) -> None:
        """Prompts of one length: by the graph for it, if there is one. A prompt that shall have one is padded on the
        right as the graph's are, so that what is captured has run before."""
        batch, count = ids.shape
        self._cursor.prompt, self._cursor.tokens, self._cursor.is_updated = None, count, False
        length = torch.full((1,), count, device=self.device)
        if not self._may_replay_prompts() or not self._prompts.serves(batch, count):
            self._take_columns(model, ids, length, 1)
            return
        graph = self._prompts.find(batch, count)
        if graph is None and self._prompts.is_due(batch, count) and self._captured_from == fingerprint(model):
            graph = self._prompts.capture(batch, count, lambda *inputs: self._take_columns(model, *inputs))
        if graph is not None:
            graph.ids[:, :count] = ids
            graph.length.copy_(length)
            graph.graph.replay()
            return
        self._take_columns(model, F.pad(ids, (0, padded(count) - count)), length)
        self._prompts.is_off = self._cursor.is_updated  # by a layer that runs the code of its class

    def _may_replay_prompts(self) -> bool:
        """Whether there is nothing around a prompt's forward that a graph would not obey."""
        return (
            self.uses_graph
            and self._shape.attention == "sdpa"  # eager masks come from the host
            and self._captured_from.is_plain
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
            and not is_intercepted()
            and not torch.is_autocast_enabled(self.device.type)
        )

    def _take_columns(self, model: Any, ids: Tensor, length: Tensor, keep: int | Tensor | None = None) -> None:
        """Prompts whose tokens are the first `length` columns, by default of which the last one's logits are kept."""
        rows = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        self._take_prompt(model, ids, None, rows, rows < length, length, length - 1 if keep is None else keep)

    def _take_prompt(
        self, model: Any, ids: Tensor, mask: Tensor | None, rows: Tensor, exists: Tensor, lengths: Tensor, keep: Any
    ) -> None:
        """The prompts' tokens, which are at these rows, into the caches, and the decoder's counters behind them."""
        batch = len(ids)
        first = self.max_length * torch.arange(batch, device=self.device)
        self._cursor.positions = None
        self._cursor.slots = torch.where(exists, first[:, None] + rows, -1)
        # What an earlier text left there may be no number at all.
        torch._foreach_zero_([x for layer in self._cache.layers for x in (layer.keys, layer.values)])
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=rows, past_key_values=self._cache,
            use_cache=True, logits_to_keep=keep, return_dict=True)  # fmt: skip
        self._counts.zero_()
        self._positions.zero_()
        self._positions[:batch] = lengths
        self._tokens.zero_()
        self._ends.fill_(False)
        self._finished.fill_(False)
        self._prompt_logits[:batch] = out.logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each sequence; returns the logits that follow it, [batch, vocabulary].

        tokens: int64 or int32 [batch] or [batch, 1] on the model's device. The logits are the decoder's memory: they
        hold until the next step. ValueError: shape, dtype or device. RuntimeError: no prefill before it, or the
        decoder is full.
        """
        model = self._checked_model("step")
        if not self._batch:
            raise RuntimeError("step: there is no text to go on with: call prefill first")
        _check_tokens("step", "tokens", tokens, self.device)
        if tuple(tokens.shape) not in ((self._batch,), (self._batch, 1)):
            raise ValueError(f"step: tokens has shape {list(tokens.shape)}, expected [{self._batch}], one per sequence")
        if self._length >= self.max_length:
            raise RuntimeError(f"step: the decoder is full: max_length is {self.max_length}; make one with more")
        self._owner = object()
        self._tokens[: self._batch] = tokens.view(-1)
        self._advance(model)
        return self._step_logits[: self._batch]

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        *,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        look_every: int | None = None,
    ) -> Iterator[Tensor]:
        """Greedy decoding: yields the tokens of each step, int64 [batch] on the CPU, as soon as they are known.

        It ends after max_new_tokens, or with the step in which the last sequence has reached one of eos_token_id;
        sequences that reached it before yield pad_token_id. Both are the model's own by default, and the first end of
        sequence where it has no padding.
        look_every: how many steps are queued between two looks at the results, by default 1 on the CPU and LOOK_EVERY
        on a GPU, which works on the next ones meanwhile: tokens come in bunches of so many, and up to twice as many
        steps may run past the end, of which nothing is returned. ValueError: as prefill, and the other arguments.
        RuntimeError from the iterator: the decoder was used for something else in between.
        """
        config, gpu = self._checked_model("generate").generation_config, self.device.type == "cuda"
        for name, number in (("max_new_tokens", max_new_tokens), ("look_every", look_every)):
            if (type(number) is not int or number < 1) and not (name == "look_every" and number is None):
                raise ValueError(f"generate: {name} is {number!r}, expected a whole number >= 1")
        ends = config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [] if ends is None else [int(end) for end in ([ends] if isinstance(ends, int) else ends)]
        pad = config.pad_token_id if pad_token_id is None else pad_token_id
        pad = (ends[0] if ends else 0) if pad is None else int(pad)
        if not all(0 <= token < self._shape.vocabulary for token in (*ends, pad)):
            raise ValueError(
                f"generate: eos_token_id is {ends} and pad_token_id is {pad}, expected tokens below "
                f"{self._shape.vocabulary}"
            )
        lengths = self._checked_prompt(input_ids, attention_mask)[2]
        if (rows := max(lengths) + max_new_tokens - 1) > self.max_length:
            raise ValueError(
                f"generate: {max(lengths)} tokens and {max_new_tokens} new ones need max_length={rows}, the decoder "
                f"has {self.max_length}"
            )
        self.prefill(input_ids, attention_mask)
        with torch.no_grad():
            self._ends[torch.tensor(ends, dtype=torch.int64, device=self.device)] = True
            self._pad.fill_(pad)
            self._finished[self._batch :] = True
            self._choose(self._prompt_logits)
        every = (LOOK_EVERY if gpu else 1) if look_every is None else look_every
        return self._stream(self._owner, max_new_tokens, every, 1 if gpu else 0, torch.tensor(ends, dtype=torch.int64))

    def _stream(self, owner: object, total: int, every: int, ahead: int, ends: Tensor) -> Iterator[Tensor]:
        """Keeps `ahead` bunches of steps queued in front of the one whose tokens it yields."""
        queued, batch = 1, self._batch
        reads, finished = deque([self._read(0, 1)]), torch.zeros(batch, dtype=torch.bool)
        while True:
            if self._owner is not owner:
                raise RuntimeError("generate: the decoder was used for something else; take all tokens first")
            with torch.no_grad():
                while queued < total and len(reads) <= ahead:
                    model, stop = self._checked_model("generate"), min(total, queued + every)
                    for _ in range(queued, stop):
                        self._advance(model)
                    reads.append(self._read(queued, stop))
                    queued = stop
            if not reads:
                return
            for tokens in reads.popleft()().unbind(1):
                finished |= torch.isin(tokens, ends)
                is_over = bool(finished.all())
                yield tokens
                if is_over:
                    return

    def _read(self, start: int, stop: int) -> Callable[[], Tensor]:
        """Starts to copy these columns of the tokens; the result waits for it and gives [batch, stop - start]."""
        chosen = self._history[: self._batch, start:stop]
        if self.device.type != "cuda":
            return chosen.clone
        copy = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        copy.copy_(chosen.contiguous(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            event.synchronize()
            return copy.clone()

        return wait

    def _advance(self, model: Any) -> None:
        """One step of all sequences, from self._tokens: the replay on a GPU, and nothing else there."""
        if self._graph is not None:
            self._graph.replay()
            self._step_logits = self._graph_logits
        else:
            self._step(model, self._length + 1)
        self.replays += 1
        self._length += 1

    def _step(self, model: Any, rows: int, masks: Any = None) -> None:
        self._step_logits = self._forward(model, rows, self._masks(rows) if masks is None else masks)
        self._choose(self._step_logits, self._positions)

    def _masks(self, rows: int) -> Any:
        """Of `rows` rows of the cache each sequence attends to those up to its own, or to the last of them where a
        layer has a window."""
        here = self._positions[:, None]
        seen = self._keys[:rows] <= here
        masks = {"full_attention": seen}
        if self._shape.window is not None:
            masks["sliding_attention"] = seen & (self._keys[:rows] > here - self._shape.window)
        return self._shape.pick({kind: self._shape.as_mask(seen[:, None, None]) for kind, seen in masks.items()})

    def _forward(self, model: Any, rows: int, masks: Any) -> Tensor:
        """The logits [batch, vocabulary] after self._tokens, which stand at self._positions."""
        self._cursor.positions, self._cursor.rows, self._cursor.slots = self._positions, rows, None
        out = model(
            input_ids=self._tokens[:, None], attention_mask=masks, position_ids=self._positions[:, None],
            past_key_values=self._cache, use_cache=True, return_dict=True)  # fmt: skip
        logits: Tensor = out.logits[:, -1]
        return logits

    def _choose(self, logits: Tensor, positions: Tensor | None = None) -> None:
        """The next tokens, whether they end their sequences, and their place in the history, all on the device; then
        the counters stand behind them, and behind the tokens that `logits` follow, at these positions."""
        if logits.dtype == torch.float64:  # which the op does not take: of each row the largest is one, the others zero
            logits = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, logits.argmax(-1, keepdim=True), 1)
        ops.greedy_tokens(
            logits, finished=self._finished, ends=self._ends, pad=self._pad, history=self._history,
            counts=self._counts, positions=positions, out=self._tokens)  # fmt: skip

    def _capture(self, model: Any) -> None:
        """The graph of a step of this very model: of its code, and of its weights where they are. It writes to the
        first rows of the caches."""
        self._graph, self._places, self._captured_from = None, None, fingerprint(model)
        self._prompts.forget()
        counters = (self._positions, self._counts)
        for x in (*counters, self._tokens):
            x.zero_()
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            self._cursor.is_masked = False
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._step(model, self.max_length)
                    for x in counters:
                        x.zero_()
            torch.cuda.current_stream().wait_stream(side)
            # Masks that no layer looks at are not computed in every step.
            masks = None if self._cursor.is_masked else self._masks(self.max_length)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(model, self.max_length, masks)
            if masks is not None and self._cursor.is_masked:
                raise RuntimeError(
                    "prefill: a layer of the model asked for its attention mask while the step was captured, and did "
                    "not in the steps before: pass graph=False to Decoder"
                )
        self._graph, self._graph_logits, self._places = graph, self._step_logits, Places(model)
        self.captures += 1

    def _checked_model(self, call: str) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError(f"{call}: the model of this decoder is gone")
        if model.training:
            raise RuntimeError(f"{call}: the model is in training mode: call model.eval()")
        if not self._is_in_place(model):
            raise RuntimeError(f"{call}: the model was moved away from {self.device}: make a new Decoder")
        if model.config.num_key_value_heads != self._shape.heads:
            raise RuntimeError(f"{call}: the model was sharded after its Decoder was made: make a new Decoder")
        return model

    def _checked_prompt(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int], list[int]]:
        """The prompts as int64, the column in which each of them starts, and their lengths."""
        _check_tokens("prefill", "input_ids", ids, self.device)
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"prefill: input_ids has shape {list(ids.shape)}, expected [batch, tokens], both >= 1")
        batch, tokens = ids.shape
        if batch > self.batch_size:
            raise ValueError(f"prefill: input_ids has {batch} sequences, the decoder has batch_size={self.batch_size}")
        starts, lengths = [0] * batch, [tokens] * batch
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != ids.shape or mask.device != ids.device:
                got = f"{list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__qualname__
                raise ValueError(
                    f"prefill: attention_mask is {got}, expected {list(ids.shape)} on {ids.device} as input_ids is"
                )
            for b, row in enumerate(mask.tolist()):
                real = [t for t, value in enumerate(row) if value]
                if not set(row) <= {0, 1} or not real or real[-1] - real[0] + 1 != len(real):
                    raise ValueError(
                        f"prefill: attention_mask of sequence {b} is not one run of ones with zeros around it: masks "
                        "with holes, without tokens or of other numbers are not served"
                    )
                starts[b], lengths[b] = real[0], len(real)
        if max(lengths) > self.max_length:
            raise ValueError(f"prefill: {max(lengths)} tokens are more than the decoder's max_length={self.max_length}")
        return ids.long(), starts, lengths


def _check_tokens(call: str, name: str, tokens: Any, device: torch.device) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__qualname__
        raise ValueError(f"{call}: {name} is {got}, expected a torch tensor of int64 or int32")
    if tokens.device != device:
        raise ValueError(f"{call}: {name} is on {tokens.device}, the model on {device}: move it there")
