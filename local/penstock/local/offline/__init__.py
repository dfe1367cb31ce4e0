"""A model in this process: no roles, no sockets."""
