"""Export a checkpoint to ONNX. May import `gpt`, nothing else of the project."""
