"""The conversion to multi-head latent attention: moments, rope channels, latent, weights, refit, reconstruction."""
