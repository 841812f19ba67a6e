"""Factorisations of keys and values into a latent, one file each."""

from anymla.methods.mla.factorization.balanced_pca import BalancedPCA
from anymla.methods.mla.factorization.joint_svd import JointSVD
from anymla.methods.mla.factorization.latent import Factorization, Latent, LatentProblem
from anymla.methods.mla.factorization.output_aware import OutputAware
from anymla.methods.mla.factorization.split_svd import SplitSVD
from anymla.methods.mla.factorization.whitened import Whitened

FACTORIZATIONS: dict[str, Factorization] = {
    "output-aware": OutputAware(),
    "joint-svd": JointSVD(),
    "split-svd": SplitSVD(),
    "whitened": Whitened(),
    "balanced-pca": BalancedPCA(),
}

__all__ = ["FACTORIZATIONS", "Factorization", "Latent", "LatentProblem"]
