"""Papers of which several choices come."""

from anymla.methods.base import Paper

OWN = Paper(title="anymla")
MHA2MLA = Paper(title="MHA2MLA", arxiv="2502.14837")
TRANSMLA = Paper(title="TransMLA", arxiv="2502.07864")
DEEPSEEK = Paper(title="DeepSeek-V2 (multi-head latent attention)", arxiv="2405.04434")
