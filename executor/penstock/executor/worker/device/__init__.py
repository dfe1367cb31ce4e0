"""The runner whose batch lives on the device: steps are launched ahead, a steady decode step uploads a few words."""
