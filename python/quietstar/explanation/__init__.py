"""What thinking does to each token of a text, as a page."""
