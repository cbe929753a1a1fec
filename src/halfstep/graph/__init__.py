"""The network as a graph: captured, folded, and the places where quantizers go."""
