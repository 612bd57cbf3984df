"""Every interface that the service answers."""

from rlhf_ray.serving.protocols import classify, embeddings, native, openrlhf, rerank, slime, tei
from rlhf_ray.serving.protocols.protocol import Protocol

PROTOCOLS: tuple[Protocol, ...] = (
    native.REWARD,
    openrlhf.GET_REWARD,
    classify.CLASSIFY,
    classify.POOLING,
    rerank.SCORE,
    rerank.RERANK,
    rerank.RERANK_OR_TEI,
    embeddings.EMBEDDINGS,
    tei.PREDICT,
    slime.RM,
)
"""Every interface; their paths are all different."""
