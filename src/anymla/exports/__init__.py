"""A converted model in the formats of serving engines, a folder each; no model object."""
