"""Speed and memory of models, tuning of the GPU kernels, and a description of the machine."""
