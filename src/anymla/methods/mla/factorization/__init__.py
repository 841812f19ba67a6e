"""Factorisations of keys and values into a latent, one file each: a class of Factorization with a name is one."""

from anymla.methods.base import classes_in
from anymla.methods.mla.factorization.choice import Factorization

FACTORIZATIONS: dict[str, Factorization] = {
    name: kind() for name, kind in classes_in(__path__, __name__, Factorization).items()
}

__all__ = ["FACTORIZATIONS", "Factorization"]
