"""A decode step of few rows at the speed of memory: products by vector units, everything else fused into them.

With a row or two a step does little but read weights. Five kernels a layer do it: a product of the normalised
stream for queries, keys and values; attention, which normalises, rotates and stores these; the product back onto the
stream; the gated product; the product back. Each is launched while the one before it still runs
(:mod:`penstock.kernels.overlap`), and has its first weights in registers by the time that one ends. The last kernel of
a step chooses the token, so that a step needs nothing from the host.
"""
