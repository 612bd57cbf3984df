"""A model that takes over is served exactly as the one before it: only its weights are others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import LoraConfig, MakeConfig, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.serving.backend import with_weights_of

OF_THE_WEIGHTS = {"path", "revision", "make"}
SERVED = ModelConfig(
    path="old",
    revision="v1",
    dtype="fp16",
    attention="sdpa",
    lora=LoraConfig(rank=4),
    quantization="nf4",
    gradient_checkpointing=True,
    trust_remote_code=True,
    head_init="zero",
    replace_head=True,
    value_head_prefix="v_head",
    head_dtype="model",
)
"""A model with a value of its own in every field."""


def test_the_example_sets_every_field_to_another_value_than_the_default() -> None:
    fields = ModelConfig.model_fields
    alike = {name for name, field in fields.items() if getattr(SERVED, name) == field.get_default()}
    assert alike == {"make"}, "give a new field a value of its own above"


@pytest.mark.parametrize("field", sorted(set(ModelConfig.model_fields) - OF_THE_WEIGHTS))
def test_every_property_of_the_served_model_is_kept(field: str) -> None:
    assert getattr(with_weights_of(SERVED, "new", None), field) == getattr(SERVED, field)


@pytest.mark.parametrize("revision", [None, "v2"])
def test_path_and_revision_are_those_of_the_new_model(revision: str | None) -> None:
    new = with_weights_of(SERVED, "new", revision)
    assert (new.path, new.revision, new.make) == ("new", revision, None)


def test_a_made_model_gives_way_to_one_with_a_path() -> None:
    made_model = ModelConfig(make=MakeConfig(shape="llama-tiny", tokenizer_from="world"), dtype="fp32")
    assert with_weights_of(made_model, "new", None) == ModelConfig(path="new", dtype="fp32")


def test_the_gateway_loads_the_new_weights_into_replicas_of_the_same_kind(config: Callable[..., ServeConfig]) -> None:
    from rlhf_ray.serving.gateway import Gateway

    loaded: list[RoleConfig] = []

    class Reloading(Gateway):
        """The gateway without its cluster."""

        def _replicas(self, name: str, role: RoleConfig) -> list[Any]:
            loaded.append(role)
            return []

        def _in_loop(self, work: Coroutine[Any, Any, Any]) -> None:
            asyncio.run(work)

        def _named(self, model: str | None) -> Any:
            class Served:
                name = "reward"
                current = type("Current", (), {"name": "2"})

                def replace(self, backends: list[Any]) -> Coroutine[Any, Any, None]:
                    return asyncio.sleep(0)

            return Served()

    settings = config()
    settings = settings.model_copy(update={"reward": settings.reward.model_copy(update={"model": SERVED})})
    gateway = object.__new__(Reloading)
    gateway.config = settings
    assert gateway.reload("new", None, "v2") == "2"
    assert loaded == [settings.reward.model_copy(update={"model": with_weights_of(SERVED, "new", "v2")})]
    assert gateway.alive().served["reward"].model == with_weights_of(SERVED, "new", "v2"), (
        "it is not what is served now"
    )
