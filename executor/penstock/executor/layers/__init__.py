"""The layers that model families are written in."""
