"""HarmoniCa (Huang et al., ICML 2025, arXiv 2410.01723): learn when and where to reuse, without images.

A router is a table of T x N free logits theta; r = sigmoid(theta). Training mixes softly, deployment switches hard:

    training    h = r f(x) + (1 - r) c        and the slot takes detach(h) where r > tau
    deployment  computed where r > tau, reused elsewhere

router.py    the logits, and the soft route that training takes through the network
sdt.py       step-wise denoising training: the loop
iepo.py      the image error proxy objective: how much each call matters for the finished image
steering.py  beta from a target CUR or speed-up; not in the paper, which fixes beta
"""

from hcompress.caching.harmonica.router import Router, soft_route
from hcompress.caching.harmonica.sdt import OneProcess, Progress, Ranks, Training

__all__ = ["OneProcess", "Progress", "Ranks", "Router", "Training", "soft_route"]
