"""HarmoniCa (Huang et al., ICML 2025, arXiv 2410.01723): learn when and where to reuse, without images.

sdt.py       step-wise denoising training: the loop
iepo.py      the image error proxy objective: how much each call matters for the finished image

The router and the steering of beta, which Learning-to-Cache shares, are in the folder above.
"""

from hcompress.caching.harmonica.sdt import Training

__all__ = ["Training"]
