"""Running an exported file: parity, proof of integer kernels, latency, sites."""
