"""The contract between deciding and computing, and what computes: importing this part loads no torch."""
