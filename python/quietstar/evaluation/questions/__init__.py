"""Questions with answers: reading them, asking them, scoring them."""
