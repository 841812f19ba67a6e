"""A converted model in the formats of serving engines, a file each; no model object."""
