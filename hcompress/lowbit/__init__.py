"""A network with some of its linear layers in few bits: the layer, the adapter around it, and how both are stored.

What all quantizers (hcompress.quant) produce and all else consumes, so neither knows the other.
"""
