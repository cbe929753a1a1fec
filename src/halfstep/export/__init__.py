"""Writing the network as a file that the target's runtime fuses into integer kernels."""
