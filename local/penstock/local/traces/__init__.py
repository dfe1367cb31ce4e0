"""Traces on this machine: an in-memory OTLP receiver and the waterfall that `penstock trace` draws from it.

`spans` plain data and the tree · `store` what is kept · `otlp` to and from OTLP messages · `receiver` the
gRPC server · `query` its client · `waterfall` the drawing. Importing this package loads none of them.
"""
