"""ONNX files as modules: read, checked node by node against ONNX Runtime, and traced like any other network."""
