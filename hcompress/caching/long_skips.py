"""Schedules for networks with long skips: DeepCache, and Faster Diffusion. Legend: T model calls, N branches.

Both were published for U-Nets and reuse whole feature maps. Here they decide which branches of a U-ViT are reused, and
the residual stream between those is computed as ever: patch and time embeddings and the long-skip projections of each
call are its own. That is what a port to U-ViT has to arrange anyway, since its time is a token of the stream: a stored
stream would tell the decoder the time of another call. Left out is what is no schedule: Faster Diffusion's injection
of prior noise, and its running of several decoders as one batch.

The branches are called in.0.attn ... in.K.mlp, mid.*, out.0.attn ... out.K.mlp, from the input to the output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.caching.rules import interval
from hcompress.errors import NoSchedule


def deepcache(graph: BranchGraph, num_calls: int, *, every: int, pairs: int) -> NDArray[np.bool_]:
    """DeepCache (Ma et al. 2024): full calls at multiples of `every`, else only `pairs` outermost blocks at each end.

    Raises NoSchedule for a network without long skips, and for as many pairs as it has or more.
    """
    parts = _parts(graph)
    depth = 1 + max(block for part, block in parts if part == "in")
    if pairs >= depth:
        raise NoSchedule(f"{pairs} pairs of blocks would leave nothing to reuse; pass 1 to {depth - 1}")
    outer = [
        (part == "in" and block < pairs) or (part == "out" and block >= depth - pairs)  # outputs count from the middle
        for part, block in parts
    ]
    return interval(num_calls, len(graph), every=every) | np.array(outer)


def faster_diffusion(
    graph: BranchGraph, num_calls: int, *, every: int | None = None, keys: Sequence[int] | None = None
) -> NDArray[np.bool_]:
    """Faster Diffusion (Li et al. 2024): everything at key calls, between them the decoder `out` alone.

    keys are call numbers, of which 0 always is one; `every` means its multiples. Raises NoSchedule for a network
    without long skips, and for keys past the last call.
    """
    decoder = np.array([part == "out" for part, _ in _parts(graph)])
    full = interval(num_calls, 1, every=every)[:, 0] if every else np.zeros(num_calls, np.bool_)
    full[0] = True
    for key in keys or ():
        if not 0 <= key < num_calls:
            raise NoSchedule(f"key call {key} is outside 0 to {num_calls - 1}, the calls of this solver")
        full[key] = True
    return full[:, None] | decoder


def _parts(graph: BranchGraph) -> list[tuple[str, int]]:
    """(in, mid or out; number of the block) of each branch."""
    found = [re.match(r"(in|mid|out)\.(?:(\d+)\.)?", name) for name in graph.names]
    parts = [(match[1], int(match[2] or 0)) for match in found if match]
    if len(parts) < len(graph) or {part for part, _ in parts} != {"in", "mid", "out"}:
        raise NoSchedule(
            f"this network has no long skips: its branches are called {graph.names[0]}, ... and not in.0.attn, "
            "mid.attn, out.0.attn, ... as a U-ViT's are; use another method"
        )
    return parts
