"""Networks and properties in the formats of others: ONNX and VNN-LIB."""
