"""Arrays without autograd: trees, operators, solvers, spectra, projections, filters."""
