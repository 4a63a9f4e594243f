"""What thoughts are worth: losses, questions, intervals."""
