"""Back end for CPUs: no dense mask, no tensor of R*V; one file per op."""
