"""The scheduler: one model replica, deployed as a gate and an engine."""
