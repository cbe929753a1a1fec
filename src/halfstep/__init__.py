"""halfstep: quantize a trained network to an accuracy target, proven on the runtime it is deployed to."""

__all__: list[str] = []
