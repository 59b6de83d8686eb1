"""Export to ONNX."""

from binarize.onnx.export import export_onnx

__all__ = ["export_onnx"]
