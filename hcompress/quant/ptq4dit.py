"""PTQ4DiT (Wu et al., NeurIPS 2024, arXiv 2405.16005): the spread of an input's channels shared with the weights.

    b_j = sqrt(s(X)_j / s(W)_j),  x' = x / b,  W' = W diag(b)                       salience balancing (CSB, eq. 6)
    s(X) = sum_i w_i s(X_i),  w = softmax_i(-rho_i),  rho_i = Spearman(s(X_i), s(W))       calibration (SSC, eq. 9)

over all calibration samples and calls i, s being the absmax of a channel: samples whose salient channels are not those
of the weights say most of what can be moved. Divisions are folded (hcompress.quant.balance), which the authors' code
leaves open; where none can be, an input stays as it is. That is exact in float, so the order of layers, in which they
go on from balanced predecessors, does not matter here.

Ranges: of a weight's channel the best of a few percentiles, of an input that with the least error. Not taken over:
BRECQ's learned rounding (20 000 iterations a block, hours on a CPU; here rounding is to nearest), asymmetric grids
(TensorRT has none), and quantized attention products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hcompress.adapter import Adapter
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.grid import SMALLEST_SCALE, Format
from hcompress.lowbit.linear import absmax_scale, widen
from hcompress.quant.balance import balanced, folds_of, weight_salience
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, least_error, nearest_run, observe, unfit, watch
from hcompress.quant.selection import select_as
from hcompress.quant.settings import PtqSettings

PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)  # of a weight channel's range; the authors' code has the first three
TINY = 1e-8  # beside s(W), there too


def ptq4dit(
    adapter: Adapter,
    walk: Walk,
    settings: PtqSettings,
    on_call: Callable[[int], None] = lambda done: None,
) -> QuantizedAdapter:
    """`adapter` in few bits, its inputs balanced: one walk to balance, one to calibrate.

    Raises ModelError as `observe` and `select` do.
    """
    selection = select_as(adapter, settings)
    folds = folds_of(adapter, selection)
    of_weights = {column: weight_salience(adapter, fold.readers) for column, fold in folds.items()}
    of_inputs = {column: Salience(fold.readers[0], of_weights[column]) for column, fold in folds.items()}
    watch(adapter, walk, {fold.readers[0]: of_inputs[column].see for column, fold in folds.items()}, on_call)
    divisors = {column: (of_inputs[column].mean() / (of_weights[column] + TINY)).sqrt() for column in folds}
    adapter = balanced(adapter, folds, divisors)
    first_walk = walk.num_calls if folds else 0
    seen = observe(adapter, selection, walk, on_call=lambda done: on_call(first_walk + done))
    amax = seen.amax.clone()
    for column in range(selection.num_inputs):
        format = selection.formats[selection.readers(column)[0]]
        assert format.activation_grid is not None
        amax[:, column] = least_error(
            seen.values[column], seen.weights[column], amax[:, column], format.activation_grid
        )
    amax = nearest_run(amax, seen.ran)
    if settings.one_scale:
        amax = amax.amax(dim=0, keepdim=True)
    scales = {
        name: percentile_scale(adapter.network.get_submodule(name).get_parameter("weight"), format)
        for name, format in selection.formats.items()
    }
    return build(adapter, selection, amax, torch.from_numpy(walk.table.timesteps), settings.told(), scales)


class Salience:
    """The mean of layer `name`'s s(X_i) under SSC's weights, sample by sample: a softmax needs no second look."""

    def __init__(self, name: str, of_weights: Tensor) -> None:
        self.name, self.of_weights = name, of_weights
        self.total, self.sum = torch.zeros_like(of_weights), torch.zeros(())

    def see(self, call: int, x: Tensor) -> None:
        """One call's inputs [R, ..., in]; each row is a sample. Raises ModelError for NaN or infinity."""
        if not x.isfinite().all():
            raise unfit(self.name, call, "holds NaN or infinity")
        each = x.detach().abs().flatten(1, -2).amax(dim=1).float()  # [R, in]
        weights = (-spearman(each, self.of_weights)).exp()  # in [1/e, e]: no overflow to guard against
        self.total += weights @ each
        self.sum = self.sum + weights.sum()

    def mean(self) -> Tensor:
        """s(X), [in], above 0."""
        return (self.total / self.sum).clamp(min=TINY)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of each row of [R, n] with [n]; ties are ranked in their order."""
    ranks = [x.argsort(dim=-1).argsort(dim=-1).float() for x in (a, b)]
    x, y = (rank - rank.mean(dim=-1, keepdim=True) for rank in ranks)
    return (x * y).sum(dim=-1) / (x.norm(dim=-1) * y.norm())


def percentile_scale(weight: Tensor, format: Format) -> Tensor:
    """The step sizes [out, blocks] of least squared error, of the ranges that hold a PERCENTILES share of a channel."""
    weight, whole = weight.detach().float(), absmax_scale(weight, format)
    blocks = weight.abs().unflatten(1, (whole.shape[1], -1))
    scales = torch.stack([blocks.quantile(share, dim=2) / format.weight_grid.high for share in PERCENTILES])
    scales = scales.clamp(min=SMALLEST_SCALE)  # [4, out, blocks]
    errors = [
        (weight - format.weight_grid.fake(weight, widen(scale, weight.shape[1]))).square().unflatten(
            1, (whole.shape[1], -1)
        ).sum(dim=2)
        for scale in scales
    ]  # fmt: skip
    return scales.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]
