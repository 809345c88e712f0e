"""Checkpoint to ONNX. May import `gpt`, nothing else of the project."""
