"""What all benchmarks share: cases, candidates, the clock, and the comparison that checks and times them."""
