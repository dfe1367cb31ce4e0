"""Everything on this machine: the `penstock` command, and what starts the roles as processes of their own."""
