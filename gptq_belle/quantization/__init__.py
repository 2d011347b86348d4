"""Quantization: settings, calibration, Hessians, the solver, and the job that runs them block by block."""
