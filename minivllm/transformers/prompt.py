"""Graphs of prompts. A prompt is some two hundred launches, which take the host longer than a GPU takes for few tokens.

A Decoder therefore captures a prompt's forward where the host is the slower one, and replays it for prompts that are
not longer: behind its last token a prompt has padding, which no token in front of it sees, and which the cache does
not store. The first prompt of a length runs as it is, the second is captured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tokens times the elements of a layer's weights: with more, a GPU multiplies for longer than the host launches the
# layer, which takes some 250 us; at 500 TFLOP/s.
MOST_PRODUCTS = 6e10
MOST_GRAPHS = 8  # the least recently used one goes
LEAST_STEP = 16  # tokens


def padded(length: int) -> int:
    """The length of the graph for a prompt: at most an eighth more, or LEAST_STEP."""
    step = max(LEAST_STEP, 1 << max(length.bit_length() - 4, 0))
    return -(-length // step) * step


class Graph(NamedTuple):
    """The forward of a prompt. ids: [batch, columns]; length: [1], how many of the columns are tokens."""

    graph: Any
    ids: Tensor
    length: Tensor


class PromptGraphs:
    """Those of one Decoder, by batch and columns. most_tokens: batch x columns of the largest. is_off: the model as it
    is now has none."""

    def __init__(self, most_tokens: int, device: torch.device) -> None:
        self.most_tokens, self.device = most_tokens, device
        self.captures, self.is_off = 0, False
        self._graphs: OrderedDict[tuple[int, int], Graph] = OrderedDict()
        self._seen: set[tuple[int, int]] = set()
        self._pool: Any = None  # of memory, one for all: no two of them run at the same time

    def forget(self) -> None:
        """The model is another one."""
        self._graphs.clear()
        self._seen.clear()
        self._pool, self.is_off = None, False

    def serves(self, batch: int, length: int) -> bool:
        return not self.is_off and batch * padded(length) <= self.most_tokens

    def find(self, batch: int, length: int) -> Graph | None:
        key = batch, padded(length)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def is_due(self, batch: int, length: int) -> bool:
        """Whether a prompt of this size was asked about before."""
        key = batch, padded(length)
        if key in self._seen:
            return True
        self._seen.add(key)
        return False

    def capture(self, batch: int, length: int, forward: Callable[[Tensor, Tensor], None]) -> Graph:
        """forward: of a Graph's ids and length. A prompt of this size has run before."""
        key = batch, padded(length)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False):
            ids = torch.zeros(key, dtype=torch.int64, device=self.device)
            graph = Graph(torch.cuda.CUDAGraph(), ids, torch.ones(1, dtype=torch.int64, device=self.device))
        with torch.cuda.device(self.device), torch.cuda.graph(graph.graph, pool=self._pool):
            forward(graph.ids, graph.length)
        if len(self._graphs) == MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self._graphs[key] = graph
        self.captures += 1
        return graph
