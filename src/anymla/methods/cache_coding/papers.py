"""Where ways of coding a cache come from."""

from anymla.methods.base import Paper

TRANSFORM_CODING = Paper(title="anymla (transform coding of keys before rope and of values)")
KVQUANT = Paper(title="KVQuant", arxiv="2401.18079")
