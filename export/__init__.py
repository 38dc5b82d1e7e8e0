"""Modules to ONNX to a verified bundle (needs the `export` extra: torch, onnx, onnxscript)."""
