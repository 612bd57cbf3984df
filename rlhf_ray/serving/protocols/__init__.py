"""The interfaces that the service answers, one file a family."""

from rlhf_ray.serving.protocol import Protocol
from rlhf_ray.serving.protocols import classify, embeddings, native, openrlhf, rerank, slime, tei

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
