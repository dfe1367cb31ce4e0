"""Decisions: plain data in, plain data out; no torch, grpc, asyncio, clock or randomness of its own."""
