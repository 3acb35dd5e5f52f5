"""Structured pruning: which heads and MLP units a network can do without, and teaching it to.

`taylor` finds them (Diff-Pruning), hcompress.pruned takes them out, `finetune` trains what is left.
"""
