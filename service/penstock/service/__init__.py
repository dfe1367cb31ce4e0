"""The public front door: authenticates, validates, turns text into tokens and back, routes and streams."""
