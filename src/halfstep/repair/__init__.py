"""Repairs before any training: the same float function, in weights that few bits hold better.

Every repair is a pass over a :class:`~halfstep.model.QuantizedModel` that says what it did.
"""
