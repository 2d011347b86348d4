"""From weights to codes: presets, calibration, Hessians, the solver, and the job that joins them."""
