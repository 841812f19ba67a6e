"""The converted model as transformers runs it."""

import transformers  # noqa: F401  loading it registers the families; first, or registration would meet itself
