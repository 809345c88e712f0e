"""ONNX to a compiled library. Imports `export.artifact` and the torch-free files of `gpt`; never torch."""
