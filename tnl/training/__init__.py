"""Training: the loop, its DeepSpeed engine, schedules, guards, and the checkpoint commit protocol."""
