"""The gate process: the SchedulerService in front of one engine."""
