"""FID, sFID, IS, KID, precision and recall as they are published: the formulas, over Inception's features.

Protocols are those of ADM's evaluator, where it has one: FID and sFID over all samples, IS as the mean over splits of
5 000 samples in order, precision and recall with k = 3 in `pool`. KID is torch-fidelity's: the mean over 100 random
subsets of 1 000, in thousandths. Published figures are of 50 000 samples, precision and recall with 10 000 real ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hcompress.errors import DataError
from hcompress.metrics.distances import class_score, frechet_to, kernel_distance, precision_recall
from hcompress.metrics.inception import POOL, SPATIAL, Features
from hcompress.metrics.reference import Reference

IS_SPLIT, KID_SUBSETS, KID_SUBSET, KID_UNIT, NEIGHBOUR = 5000, 100, 1000, 1000, 3
PUBLISHED = 50_000


def published_metrics(features: Features, reference: Reference) -> tuple[dict[str, float], list[str]]:
    """inception_score, fid, sfid, kid, inception_precision, inception_recall; and what to know about them.

    A metric without what it needs (real pictures, enough samples) is left out and named. Raises DataError for fewer
    than 4 samples, with which nothing is defined.
    """
    n, real = len(features), reference.pool
    if n <= NEIGHBOUR:
        raise DataError(
            f"{n} samples are too few for any metric: precision needs {NEIGHBOUR + 1}, published FID {PUBLISHED}"
        )
    notes = _floors(n)
    figures = {"inception_score": inception_score(features.logits)}
    figures["fid"] = frechet_to(features.pool, *reference.moments)
    if reference.spatial is not None:
        figures["sfid"] = frechet_to(features.spatial, *reference.spatial)
    else:
        notes.append(f"sfid is left out: {reference.name} holds no mu_s and sigma_s")
    if real is None:
        notes.append(f"kid, precision and recall are left out: {reference.name} holds statistics and no pictures")
        return figures, notes
    if min(n, len(real)) >= KID_SUBSET:
        figures["kid"] = kernel_inception_distance(features.pool, real)
    else:
        notes.append(f"kid is left out: it needs {KID_SUBSET} samples and real pictures, got {n} and {len(real)}")
    if len(real) > NEIGHBOUR:
        precision, recall = precision_recall(features.pool, real, NEIGHBOUR, exact=False)
        figures |= {"inception_precision": precision, "inception_recall": recall}
    else:
        notes.append(f"precision and recall are left out: they need {NEIGHBOUR + 1} real pictures, got {len(real)}")
    return figures, notes


def inception_score(logits: Tensor) -> float:
    """Mean over splits of 5 000 of exp E KL(p(y|x) || p(y)), logits [N, 1008]. Salimans et al. 2016."""
    return float(np.mean([class_score(split) for split in logits.split(IS_SPLIT)]))


def kernel_inception_distance(generated: Tensor, real: Tensor, subsets: int = KID_SUBSETS) -> float:
    """1000 x KID of features [N, D] and [M, D], N and M at least 1 000. Bińkowski et al. 2018."""
    rng = np.random.RandomState(2020)  # torch-fidelity's, and in its order
    drawn = []
    for _ in range(subsets):
        x, y = (torch.from_numpy(rng.choice(len(one), KID_SUBSET, replace=False)) for one in (generated, real))
        drawn.append(kernel_distance(generated[x], real[y]))
    return KID_UNIT * float(np.mean(drawn))


def _floors(n: int) -> list[str]:
    """What too few samples do to which metric."""
    notes = [
        f"{name} of {n} samples is mostly bias: a covariance of {width} features needs {width + 1}; compare it at this "
        f"number only (published: {PUBLISHED})"
        for name, width in (("fid", POOL), ("sfid", SPATIAL))
        if n <= width
    ]
    return notes if n >= IS_SPLIT else [*notes, f"inception_score of {n} samples is low: it is defined over {IS_SPLIT}"]
