"""Quantizers: an Adapter in, an Adapter with the same branches and layers in few bits out (hcompress.lowbit)."""
