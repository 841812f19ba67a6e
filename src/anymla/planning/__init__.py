"""A budget to rope dims and rank per layer, and what they cost."""
