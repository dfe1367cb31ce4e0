"""`penstock bench`: how fast a model is on this machine, and how fast the machine could be at best."""
