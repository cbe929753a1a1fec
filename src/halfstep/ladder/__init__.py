"""The rungs: post-training quantization, partial quantization, quantization-aware training."""
