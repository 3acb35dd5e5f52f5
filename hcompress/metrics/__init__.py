"""How far a compressed sampler has moved: from its own dense samples (`paired`), and from real images (`fashion`,
`emoji`).

Names are kept true: FID, sFID, IS and CLIP score mean the published networks, and nothing here is called so.
"""
