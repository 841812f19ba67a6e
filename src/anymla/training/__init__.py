"""Recovery: a converted model learns to give what the original gave."""
