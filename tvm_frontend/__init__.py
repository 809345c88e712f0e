"""Compiles a GPT of ONNX to a library and runs it. Imports `export.artifact` and torch-free files of `gpt` only."""
