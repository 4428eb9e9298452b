"""Which layers of a model can be quantized: where they are, under which names, and what prevents it."""
