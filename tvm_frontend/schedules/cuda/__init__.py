"""Schedules for NVIDIA GPUs. `default.schedule_cuda` is what the pipeline calls."""
