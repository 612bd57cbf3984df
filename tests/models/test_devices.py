"""A rank computes on the device that it was placed on, or is refused; nothing asks the machine what to compute on.

The 'meta' device stands for the GPU where a model is only put there.
"""

from __future__ import annotations

import ast
import io
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import deepspeed
import pytest
import torch

import rlhf_ray
from rlhf_ray.actors.cluster import variables_of
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.shells import EncoderRewardModelActor, PolicyModelActor, RolloutActor
from rlhf_ray.actors.workers.encoder import EncoderRewardWorker
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker, VllmRewardWorker
from rlhf_ray.actors.workers.rollout import RolloutSetup, RolloutWorker
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import LoraConfig, MakeConfig, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig, ScoringRole
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.engine import distributed
from rlhf_ray.environment import ALLOCATOR
from rlhf_ray.errors import CapacityError, ModelLoadError, RequestError
from rlhf_ray.models import actor, from_config, load_policy, load_regression, regression_loading, reread
from rlhf_ray.models.devices import GpuPeak, placed_device, seeded, take_peak
from rlhf_ray.models.weights import load
from rlhf_ray.rollout import transformers_engine, vllm_engine
from rlhf_ray.trajectories.batch import TrajectoryBatch

PACKAGE = Path(rlhf_ray.__file__).parent
MAKE = MakeConfig(shape="llama-tiny", tokenizer_from="world")
GPU = torch.device("meta")
LIBRARIES = {"torch.cuda", "cuda", "torch.accelerator"}
ASKING = {"is_available", "device_count", "current_device", "is_initialized", "current_accelerator"}
"""Functions of :data:`LIBRARIES` that tell what a machine has."""
MAY_ASK = {"models/devices.py", "launch/doctor.py", "engine/distributed.py"}
"""The last one asks DeepSpeed whether it chose what the rank was placed on."""


def questions(tree: ast.AST) -> list[str]:
    """Every expression of a module that asks what the machine has: ``torch.cuda.is_available``, ``which("nvidia-smi")``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ASKING and ast.unparse(node.value) in LIBRARIES:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Constant) and node.value == "nvidia-smi":
            found.append("nvidia-smi")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("get_accelerator"):
            found.append(ast.unparse(node))
    return found


def test_only_those_that_hold_a_placement_against_it_and_the_doctor_ask_what_there_is() -> None:
    asking = {
        str(path.relative_to(PACKAGE)): asked
        for path in PACKAGE.rglob("*.py")
        if any(word in (text := path.read_text("utf-8")) for word in ("cuda", "accelerator", "nvidia-smi"))
        and (asked := questions(ast.parse(text)))
    }
    assert asking.keys() == MAY_ASK, asking


@pytest.mark.parametrize(
    "source",
    [
        "if torch.cuda.is_available(): pass",
        "from torch import cuda\ncuda.device_count()",
        "shutil.which('nvidia-smi')",
        "torch.accelerator.current_accelerator()",
        "get_accelerator().name()",
    ],
)
def test_such_a_question_would_be_seen(source: str) -> None:
    assert len(questions(ast.parse(source))) == 1


# What a rank was placed on


def test_a_rank_without_a_gpu_computes_on_the_cpu_whatever_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert placed_device(ResourcesConfig(), "policy") == torch.device("cpu")
    assert placed_device(ResourcesConfig(gpus_per_rank=0.5), "policy") == torch.device("cuda", 0)


ON_GPU = ResourcesConfig(gpus_per_rank=1.0)


@pytest.mark.parametrize(
    ("worker", "setup"),
    [
        (PolicyWorker(), LanguageSetup(RoleConfig(model=ModelConfig(make=MAKE), resources=ON_GPU), seed=0)),
        (
            RewardWorker(),
            RewardSetup(ScoringRole(model=ModelConfig(make=MAKE, head_init="zero"), resources=ON_GPU), seed=0),
        ),
        (EncoderRewardWorker(), RewardSetup(ScoringRole(model=ModelConfig(path="none"), resources=ON_GPU), seed=0)),
        (VllmRewardWorker(), RewardSetup(ScoringRole(model=ModelConfig(path="none"), resources=ON_GPU), seed=0)),
        (RolloutWorker(), RolloutSetup(RolloutConfig(resources=ON_GPU), "none", (), seed=0, deterministic=False)),
        (
            RolloutWorker(),
            RolloutSetup(
                RolloutConfig(resources=ON_GPU, backend="transformers"), "none", (), seed=0, deterministic=False
            ),
        ),
    ],
    ids=lambda value: getattr(value, "role", ""),
)
def test_a_rank_placed_on_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, worker: Any, setup: Any
) -> None:
    """There is no such model either, so whatever is read first would fail otherwise."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(Exception) as refused:
        worker.setup(setup)
    assert isinstance(refused.value, CapacityError)
    for part in (
        f"the {worker.role} was placed on 1 GPU",
        "sees 0",
        "CUDA_VISIBLE_DEVICES is '3'",
        "gpus_per_rank to 0",
    ):
        assert part in str(refused.value)


def test_an_engine_of_four_gpus_needs_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(CapacityError, match=r"rollout was placed on 4 GPU .* sees 3"):
        placed_device(ResourcesConfig(gpus_per_rank=4.0), "rollout")


def test_a_rank_that_shares_a_gpu_gets_its_share_of_the_memory_and_one_process_with_all_roles_gets_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    for worker in (PolicyModelActor, EncoderRewardModelActor, RolloutActor):
        for gpus in (0.0, 0.25, 1.0):
            worker().take_device(ResourcesConfig(gpus_per_rank=gpus))
    assert limits == [(0.25, torch.device("cuda", 0))] * 3
    PolicyWorker().take_device(ResourcesConfig(gpus_per_rank=0.25))
    assert len(limits) == 3, "its process belongs to other roles too"


def test_only_what_others_open_over_cuda_ipc_does_not_grow() -> None:
    """Engines on its GPU open that of a policy, and the workers of an engine that of one another."""

    def grows(worker: Literal["policy", "critic", "rollout"], gpus: float) -> bool:
        return ALLOCATOR in variables_of(RankSpec(worker, 1, ResourcesConfig(gpus_per_rank=gpus)), hub=False)

    assert [grows("policy", gpus) for gpus in (0.0, 0.25, 1.0)] == [False, False, True]
    assert grows("critic", 0.25) and grows("critic", 1.0)
    assert not grows("rollout", 0.3) and not grows("rollout", 4.0)


def test_a_process_in_which_deepspeed_took_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It chooses one when it is imported. A rank on a GPU would compute on the CPU without a word."""
    monkeypatch.setattr(deepspeed, "init_distributed", lambda: None)
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
    with pytest.raises(RequestError, match="placed on cuda, but DeepSpeed was imported in this process for cpu"):
        distributed._join_deepspeed(torch.device("cuda", 0))


def test_the_peak_of_gpu_memory_is_that_since_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    assert take_peak(torch.device("cpu")) is None and reset == []
    assert take_peak(torch.device("cuda", 0)) == GpuPeak(3.0, 5.0) and reset == [torch.device("cuda", 0)]


@pytest.mark.parametrize("nvidia_smi", [True, False])
@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_an_engine_computes_where_it_was_placed_with_or_without_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backend: Literal["vllm", "transformers"],
    gpus: float,
    nvidia_smi: bool,
) -> None:
    """A machine with a GPU runs jobs without one, and a container with a GPU may lack the tool."""
    given: list[torch.device] = []
    engines: dict[str, tuple[Any, str]] = {
        "vllm": (vllm_engine, "VllmEngine"),
        "transformers": (transformers_engine, "TransformersEngine"),
    }
    monkeypatch.setattr(*engines[backend], lambda *_, device, **__: given.append(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if nvidia_smi:
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = RolloutConfig(backend=backend, resources=ResourcesConfig(gpus_per_rank=gpus))
    RolloutWorker().setup(RolloutSetup(config, "none", (), seed=0, deterministic=False))
    assert given == [torch.device("cuda", 0) if gpus else torch.device("cpu")]


# Where models lie


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on 'meta' have no numbers to run on."""
    for module in (actor, regression_loading):
        monkeypatch.setattr(module, "check_packing", lambda model, backbone: None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    from_config.save_pretrained(load_policy(ModelConfig(make=MAKE)).model, None, made)
    tokenizer = from_config.load_tokenizer(ModelConfig(make=MAKE))
    tokenizer.save_pretrained(made)
    return made


LORA = LoraConfig(rank=2, targets=["q_proj"])


def places(module: torch.nn.Module) -> set[str]:
    """The devices on which the parameters lie; those of the buffers are checked where models run."""
    return {parameter.device.type for parameter in module.parameters()}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("made", [True, False], ids=["made", "loaded"])
def test_every_model_lies_whole_on_the_device_of_its_rank(directory: Path, made: bool, lora: LoraConfig | None) -> None:
    source: dict[str, Any] = {"make": MAKE} if made else {"path": str(directory)}
    config = ModelConfig(**source, lora=lora, dtype="bf16")
    assert places(load_policy(config, device=GPU)) == {"meta"}
    with_head = ModelConfig(**source, lora=lora, dtype="bf16", head_init="inv_sqrt")
    for kind in ("reward", "critic"):
        assert places(load_regression(with_head, kind, device=GPU)) == {"meta"}


def test_weights_in_4_bits_lie_on_the_named_device_and_not_on_any_that_transformers_sees(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    asked: list[Any] = []

    def from_pretrained(*_: Any, device_map: Any, **__: Any) -> Any:
        asked.append(device_map)
        raise RuntimeError("seen")

    auto: Any = SimpleNamespace(from_pretrained=from_pretrained)
    checkpoint = load.Checkpoint.open(str(directory))
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        with pytest.raises(load.ModelLoadError, match="seen"):
            load.load_weights(auto, checkpoint, torch.bfloat16, device=device, load_in_4bit=True)
    assert asked == [{"": torch.device("cpu")}, {"": torch.device("cuda", 0)}]


def test_a_kept_reward_model_is_read_back_and_scored_on_the_device_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Every tensor of a pack is moved: on 'meta' a forward pass over tensors of two devices is an error."""
    config = ModelConfig(make=MAKE, head_init="inv_sqrt", dtype="bf16")
    loaded_on: list[torch.device] = []
    given: list[torch.device] = []

    class Scores(torch.nn.Module):
        def forward(self, packed: Any, kind: str) -> torch.Tensor:
            given.extend(tensor.device for tensor in (packed.token_ids, packed.offsets, packed.position_ids))
            return torch.zeros(len(packed))

    def load_there(saved: ModelConfig, kind: str, *, device: torch.device) -> Any:
        loaded_on.append(device)
        return Scores()

    monkeypatch.setattr(reread, "load_regression", load_there)
    monkeypatch.setattr(reread, "PackedRegression", lambda module: module)
    assert len(reread.score_directory(directory, config, TrajectoryBatch.from_sequences([[1, 2], [3]]), GPU)) == 2
    assert loaded_on == [GPU] and set(given) == {GPU}


@pytest.mark.parametrize("place", ["loading", "scoring"])
def test_a_gpu_without_room_for_a_second_model_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO, directory: Path, place: str
) -> None:
    tried: list[torch.device] = []

    def score(directory: Path, config: ModelConfig, batch: TrajectoryBatch, device: torch.device) -> list[float]:
        tried.append(device)
        if device == GPU:
            full = torch.OutOfMemoryError("CUDA out of memory")
            if place == "scoring":
                raise full
            raise ModelLoadError("cannot be loaded") from full
        return [1.0]

    monkeypatch.setattr(reread, "_scores", score)
    batch = TrajectoryBatch.from_sequences([[1]])
    scores: list[float] = []
    with suppress(ModelLoadError, torch.OutOfMemoryError):
        scores = reread.score_directory(directory, ModelConfig(make=MAKE), batch, GPU)
    assert scores == [1.0]
    assert tried == [GPU, torch.device("cpu")] and "read back on the CPU" in project_log.getvalue()


def test_loading_leaves_the_generator_of_the_gpu_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every rank would draw the same dropout afterwards: that of the seed of its weights."""
    kept: list[Any] = []
    fork_rng = torch.random.fork_rng

    def fork(devices: Any) -> Any:
        kept.append(devices)
        return fork_rng(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        with seeded(1, device):
            pass
    assert kept == [[], [torch.device("cuda", 0)]]
