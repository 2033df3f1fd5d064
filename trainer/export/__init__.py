"""A run for others: an ONNX graph, its weights, and a card that says what it is."""
