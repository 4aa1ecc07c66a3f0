"""One fused call in surroundings that the chain of rms_norm_qkv does not have, as variants beside it."""

from benchmarks.qkv import Chain


def surroundings(chain: Chain) -> dict:
    """Variants by name.

    warm: one layer's weights over and over, which L2 keeps where they fit. in_out: the weights transposed, contiguous.
    behind a copy: x comes from a kernel of torch, which knows no programmatic launch; copy: that kernel alone.
    side stream: each call on a second stream that waits for the first, and the first for it.
    """
    import torch

    spare, side = torch.empty_like(chain.fixed), torch.cuda.Stream()
    transposed = [(norm_weight, weight.t().contiguous(), bias) for norm_weight, weight, bias in chain.layers]

    def copied(i: int) -> None:
        spare.copy_(chain.xs[i % 2])

    def behind_copy(i: int) -> None:
        copied(i)
        chain.fused(i, x=spare)

    def on_side_stream(i: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            chain.fused(i)
        torch.cuda.current_stream().wait_stream(side)

    return {
        "minivllm warm": lambda i: chain.fused(i, layer=chain.layers[0]),
        "minivllm in_out": lambda i: chain.fused(i, layer=transposed[i % len(transposed)], weight_layout="in_out"),
        "minivllm behind a copy": behind_copy,
        "copy": copied,
        "minivllm side stream": on_side_stream,
    }
