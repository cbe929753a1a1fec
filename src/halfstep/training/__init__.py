"""Fine-tuning through fake quantizers: options, the loop, its checkpoints."""
