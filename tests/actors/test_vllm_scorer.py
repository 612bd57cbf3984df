"""A reward group scores the same in vLLM's pooling runner as in its own forward; what would be scored otherwise is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.place import place_reward_group
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.workers.reward import RewardSetup
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.rollout.vllm_scorer import servable_config
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import make_schedule

from ..models.encoders import save_encoder
from ..serving.reward_models import BOS, EOS, MEAN, STD, Reference, save_reward_model

pytestmark = pytest.mark.vllm
LIMIT = 64
TURNS = ({"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."})
REQUESTS = [
    ScoreRequest(text=f"{BOS}why? because.{EOS}"),
    ScoreRequest(text="ünï " * 7),
    ScoreRequest(token_ids=(5,)),
    ScoreRequest(token_ids=tuple(range(3, 3 + LIMIT))),
    ScoreRequest(messages=TURNS),
    ScoreRequest(prompt="why? ", response="because."),
    ScoreRequest(text="no", add_special_tokens=True),
    ScoreRequest(text="x" * 90, truncate=True),
    ScoreRequest(text="x" * 90),
    ScoreRequest(text=""),
    ScoreRequest(token_ids=(10**6,)),
]
"""Every representation, one of the longest length, and three that no scorer takes."""
FAILING = 3


def group_of(path: Path, scorer: str) -> RewardGroup:
    role = ScoringRole.model_validate({"model": {"path": str(path), "dtype": "fp32"}, "scorer": scorer})
    setup = RewardSetup(role, seed=0, max_tokens=100, max_item_tokens=LIMIT)
    return place_reward_group(ThisProcess(ClusterConfig()), setup).load().result()


def test_a_group_on_vllm_gives_the_scores_of_the_packed_forward(tmp_path: Path) -> None:
    path = save_reward_model(tmp_path)
    packed, vllm = group_of(path, "packed"), group_of(path, "vllm")
    expected, scored = packed.score(REQUESTS).result(), vllm.score(REQUESTS).result()
    for one, other in zip(expected, scored, strict=True):
        assert (one.tokens, one.truncated, one.error, one.fault) == (
            other.tokens, other.truncated, other.error, other.fault
        )  # fmt: skip
    scores = np.array(
        [[one.raw, other.raw] for one, other in zip(expected, scored, strict=True) if one.raw is not None]
    )
    assert len(scores) == len(REQUESTS) - FAILING
    assert np.abs(scores[:, 0] - scores[:, 1]).max() < 1e-5
    assert np.unique(scores[:, 0].round(3)).size > 4, "scores that hardly differ compare nothing"
    assert vllm.describe().result() == packed.describe().result()
    assert (vllm.describe().result()["mean"], vllm.describe().result()["std"]) == (MEAN, STD)

    alone = [vllm.score([request]).result()[0].raw for request in REQUESTS[:4]]
    assert np.abs(np.array(alone) - scores[:4, 1]).max() < 1e-5

    batch = TrajectoryBatch.from_sequences([[5, 6, 7], [8], list(range(3, 40))])
    schedule = make_schedule(batch.lengths.tolist(), ranks=1, max_tokens=40)
    by_reference = [Reference(path).of_ids(ids) for ids in ([5, 6, 7], [8], range(3, 40))]
    assert np.abs(vllm.scores(vllm.share(batch), schedule).result().numpy() - by_reference).max() < 1e-5
    vllm.stop()
    gc.collect()  # other tests start engines in this process


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "holds LlamaForCausalLM: .* rlhf-ray export, or set scorer to packed",
        ),
        ({"id2label": {"0": "a", "1": "b"}}, "LlamaForSequenceClassification with 2 outputs"),
        ({"score_bias": 0.5}, "has a bias .score_bias 0.5., which vLLM would leave out: set scorer to packed"),
    ],
)
def test_a_model_that_vllm_would_score_otherwise_is_refused(
    tmp_path: Path, changed: dict[str, object], sentence: str
) -> None:
    path = save_reward_model(tmp_path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changed))
    with pytest.raises(RequestError, match=sentence):
        servable_config(ModelConfig(path=str(path)))


@pytest.mark.parametrize(
    ("renamed", "sentence"),
    [
        ({"score.weight": "v_head.weight"}, "head of .* is v_head, and vLLM reads one called score .* rlhf-ray export"),
        ({"score.weight": "gating.weight"}, "multi-objective head"),
        ({"score.weight": "worth.weight"}, "no head called score, but tensors outside of its backbone: worth.weight"),
    ],
)
def test_a_head_that_vllm_would_not_find_is_refused(tmp_path: Path, renamed: dict[str, str], sentence: str) -> None:
    path = save_reward_model(tmp_path)
    file = path / "model.safetensors"
    save_file({renamed.get(name, name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises((RequestError, ModelLoadError), match=sentence):
        servable_config(ModelConfig(path=str(path)))


def test_encoders_are_refused_where_vllm_would_leave_something_out(tmp_path: Path) -> None:
    assert servable_config(ModelConfig(path=str(save_encoder("roberta", tmp_path / "roberta")))).num_labels == 1
    with pytest.raises(RequestError, match=r"is an encoder of a kind \(bert\) .* set scorer to packed"):
        servable_config(ModelConfig(path=str(save_encoder("bert", tmp_path / "bert"))))


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="is an adapter, and vLLM scores merged models: rlhf-ray export it"):
        servable_config(ModelConfig(path=str(tmp_path)))
