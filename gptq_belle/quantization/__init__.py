"""From weights to codes: the grid, the Hessian, the solver, the calibration rows, and the job that joins them."""
