"""A trained model in the formats of other programs: diffusers, ONNX, safetensors, and a page for a browser."""
