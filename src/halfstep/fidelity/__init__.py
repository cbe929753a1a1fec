"""How near a quantized network is to its float model: no labels needed."""
