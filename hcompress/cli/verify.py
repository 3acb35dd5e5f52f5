"""`hcompress verify`: does a bundle still compute what PyTorch computes, on every backend that works here?"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcompress.errors import InputError

if TYPE_CHECKING:
    from hcompress.report.proof import Proof


def verify(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle; BUNDLE-dense beside it is checked too.", show_default=False)
    ],
    model: Annotated[str | None, typer.Option(help="The model it was made from; as the bundle says if absent.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many to generate at once.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    tolerance: Annotated[float | None, typer.Option(help="Relative, for all; as above if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Run a bundle and PyTorch side by side and compare every tensor that passes between calls, errors included.

    Asked call by call, from PyTorch's latents, and chained, over a whole generation. Relative, 1e-4 is allowed in
    float32 and 2e-2 in float16. Layers in few bits round their inputs, where the last bit may decide a tie. So in
    float32, on ONNX Runtime, PyTorch rounds call by call what the bundle rounds, which is compared too, within the same
    1e-4. Chained, 10 times as much is allowed as a few roundings move PyTorch itself, at least 1e-3. For float16 and
    TensorRT in few bits the two are not told apart, and the limit is wider. Step sizes must be the model's to 1e-4.

    Prints the first call and tensor that drifts further, and exits 1 then, or where no backend could run it.

    Example: hcompress verify bundle
    """
    from rich.console import Console

    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InputError(f"--tolerance {tolerance} should be a positive number, such as 1e-4")
    with Console(stderr=True).status(f"verifying {bundle}"):
        from hcompress.report.proof import prove_all

        proofs = prove_all(bundle, model, samples=samples, seed=seed, tolerance=tolerance)
    if as_json:
        print(json.dumps({"bundle": str(bundle), "proofs": [_plain(proof) for proof in proofs]}))
    else:
        print(*map(_line, proofs), sep="\n")
    if not all(proof.holds for proof in proofs) or all(proof.skipped for proof in proofs):
        raise typer.Exit(1)


def _plain(proof: Proof) -> dict[str, Any]:
    drift = proof.first_drift
    return {
        "bundle": str(proof.bundle),
        "backend": proof.backend,
        "skipped": proof.skipped,
        "tolerance": proof.tolerance,
        "worst": proof.worst,
        "rounded": proof.rounded,
        "chained_tolerance": proof.chained_tolerance,
        "chained": proof.chained,
        "products": dict(proof.products),
        "first_drift": drift and asdict(drift),
    }


def _line(proof: Proof) -> str:
    where = f"{proof.bundle.name} on {proof.backend}:"
    if proof.skipped:
        return f"{where} skipped, {proof.skipped}"
    if drift := proof.first_drift:
        place = f"{drift.tensor} of call {drift.call}"
        return f"{where} first drift: {place}, {drift.error:.1e} where {drift.allowed:.0e} is allowed"
    ran = ", ".join(f"{count} {name}" for name, count in proof.products.items())
    rounding = ", of the same rounded inputs," if proof.rounded else ""
    return (
        f"{where} agrees; call by call{rounding} {proof.worst:.1e} at worst where {proof.tolerance:.0e} is allowed, "
        f"chained {proof.chained:.1e} where {proof.chained_tolerance:.0e} is allowed; it runs {ran or 'engines'}"
    )
