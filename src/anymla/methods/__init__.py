"""Methods of compression: each one a step of a recipe."""
