"""Factorisations of keys and values into a latent, one file each."""

from anymla.factorization.balanced_pca import BalancedPCA
from anymla.factorization.joint_svd import JointSVD
from anymla.factorization.latent import Factorization, Latent, LatentProblem
from anymla.factorization.output_aware import OutputAware
from anymla.factorization.split_svd import SplitSVD
from anymla.factorization.whitened import Whitened

FACTORIZATIONS: dict[str, Factorization] = {
    "output-aware": OutputAware(),
    "joint-svd": JointSVD(),
    "split-svd": SplitSVD(),
    "whitened": Whitened(),
    "balanced-pca": BalancedPCA(),
}

__all__ = ["FACTORIZATIONS", "Factorization", "Latent", "LatentProblem"]
