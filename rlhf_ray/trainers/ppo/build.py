"""Put a PPO run together from its config, and run it.

Invariants: all data is read before the cluster is joined. The rollout engines start from a directory that the policy group
wrote. ``final/`` holds the weights that the last evaluation measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_ray.actors.cluster import group_of
from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.place import Place, PlacedGroup
from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.actors.ranks import Ranks
from rlhf_ray.actors.workers.rollout import RolloutSetup
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.roles import Form
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.ends import EndTokens
from rlhf_ray.data.load import TokenizedPrompt, load_prompts
from rlhf_ray.data.split import Split
from rlhf_ray.environments.bridge import Bridge
from rlhf_ray.environments.episodes import EpisodePlayer, Limits
from rlhf_ray.environments.process import EnvironmentProcess, load_environment
from rlhf_ray.models import load_end_tokens, load_tokenizer
from rlhf_ray.monitoring import events
from rlhf_ray.rewards.ensembles.weights import with_averages
from rlhf_ray.rewards.source import RewardSource
from rlhf_ray.rewards.user_source import check_user_source
from rlhf_ray.rollout.execution import digest
from rlhf_ray.rollout.fleet import Fleet, SetAside
from rlhf_ray.rollout.health import DOWN, FleetHealth
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.execution import keep_execution
from rlhf_ray.runs.incidents import START
from rlhf_ray.serving.expose_run import expose
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.ppo.algorithm import make_estimator, make_objective, make_preparation
from rlhf_ray.trainers.ppo.evaluation import PpoEvaluation
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.gold import make_ground_truth
from rlhf_ray.trainers.ppo.loop import PpoTrainer
from rlhf_ray.trainers.ppo.metrics import StepMetrics
from rlhf_ray.trainers.ppo.modes import Mode, OneStepOff, Sync, Windowed
from rlhf_ray.trainers.ppo.progress import PpoProgress, updates_in_all
from rlhf_ray.trainers.ppo.rewards import judges_of, make_reward_source
from rlhf_ray.trainers.ppo.roles import Groups
from rlhf_ray.trainers.ppo.sampling import Collector, PromptStream, Sampler, check_user_collector, make_collector
from rlhf_ray.trainers.ppo.self_check import SelfCheck
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trainers.recovery import Recovery, Starting
from rlhf_ray.trainers.session import Session
from rlhf_ray.trainers.stopping import Grace
from rlhf_ray.trainers.watchdog import Watchdog


def train_ppo(
    config: PpoConfig, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """Run a whole PPO job, or the rest of it after ``checkpoint``; ``place`` is where its ranks live, by default a cluster."""
    chat = ChatFormat(load_tokenizer(config.policy.model), config.data.template_variables)
    prompts = load_prompts(config.data, chat.tokenizer, config.run.seed, config.row_reader)
    ends = find_ends(config, chat, prompts)
    check_own_parts(config)
    config = config.model_copy(update={"reward": with_averages(config.reward, run.averages)})
    with (
        Session(config, run, place=place) as session,
        Journal(run, config, session.memory_of_ranks) as journal,
        Watchdog(run, config, journal, session),
    ):
        with journal.clock.part(START):
            trainer = build(config, run, session, journal, chat, ends, prompts, checkpoint)
        trainer.start()
        trainer.run()
        trainer.finish()


def find_ends(config: PpoConfig, chat: ChatFormat, prompts: Split[TokenizedPrompt]) -> EndTokens:
    """The tokens that end an answer in this run, which are logged."""
    talks = "conversation" in prompt_forms(prompts)
    ends: EndTokens = load_end_tokens(config.policy.model, chat, config.rollout.stop_tokens, conversations=talks)
    ends.log("ppo")
    return ends


def prompt_forms(prompts: Split[TokenizedPrompt]) -> set[Form]:
    """Whether the prompts are texts, conversations, or some of them both."""
    return {"text" if prompt.messages is None else "conversation" for prompt in (*prompts.train, *prompts.held_out)}


def check_own_parts(config: PpoConfig) -> None:
    """Refuse parts of the user's own that cannot be made, before a cluster is joined or a model loaded."""
    make_objective(config.algorithm)
    make_estimator(config)
    check_user_collector(config)
    if (environment := config.rollout.environment) is not None:
        load_environment(environment.name, environment.parameters)
    for key, source in config.reward.sources.items():
        check_user_source(key, source)


def build(
    config: PpoConfig,
    run: RunDirectory,
    session: Session,
    journal: Journal,
    chat: ChatFormat,
    ends: EndTokens,
    prompts: Split[TokenizedPrompt],
    checkpoint: Checkpoint | None,
) -> PpoTrainer:
    """Start every group and engine, and put the trainer together."""
    state = None if checkpoint is None else checkpoint.manifest.about["state"]["progress"]
    player = make_player(config, chat, ends, session.cleanup)  # first: what it cannot be made with costs no loading
    starting = Starting(run, config, checkpoint)
    groups, engines = start_groups(config, session, starting, updates_in_all(config, state))
    starting.surviving(groups.check_vocabularies)
    checkpoints = Checkpointer(run, config.checkpoint, groups.trained, checkpoint, config.steps)
    session.cleanup.callback(checkpoints.close)
    fleet = start_fleet(config, run, session, starting, groups.policy, engines, ends, goes_on=checkpoint is not None)
    sampler = Sampler(config, fleet, player)
    keep_set_aside(sampler.fleet, run, chat.tokenizer)
    watch_engines(sampler.fleet.health, run, journal)
    rewards = starting.surviving(lambda: make_rewards(config, groups, chat, ends, prompts, session.cleanup, run.judges))
    if config.expose is not None:
        restarts = config.run.max_group_restarts > 0
        expose(groups.rewards, config.reward.roles, config.expose, session.cleanup, restarts=restarts)
    preparation = make_preparation(config)
    learner = Learner(config, groups, preparation)
    experience = Experience(
        config,
        groups=groups,
        preparation=preparation,
        rewards=rewards,
        tokenizer=chat.tokenizer,
        stop_tokens=ends.ids,
    )
    truth = make_ground_truth(config, session.cleanup)
    evaluation = PpoEvaluation(
        config,
        experience,
        prompts.held_out,
        shaping=preparation.shaping,
        gold=truth.of_evaluations,
        measures=truth.measures,
        generate=sampler.held_out,
        directory=run.path / "evaluation",
    )
    stream = PromptStream(prompts.train, prompts.parts, config.run.seed)
    mode = make_mode(config, make_collector(config, stream, sampler, experience), stream, sampler, engines)
    checkpoints.also(mode.save)
    session.cleanup.callback(mode.close)
    return PpoTrainer(
        config,
        run_directory=run,
        groups=groups,
        sampler=sampler,
        publisher=starting.surviving(lambda: Publisher(groups.policy, sampler.fleet, engines, config.rollout)),
        prompts=stream,
        mode=mode,
        experience=experience,
        learner=learner,
        metrics=StepMetrics(config, chat.tokenizer, ends, truth.of_steps, judges_of(rewards)),
        evaluation=evaluation,
        self_check=SelfCheck(config, experience, learner),
        checkpoints=checkpoints,
        journal=journal,
        progress=PpoProgress.start(config.algorithm.kl, config.updates_per_step, config.guards),
        recovery=Recovery(
            [*groups.by_role.values(), *groups.rewards.values()], checkpoints, config.run, starting.losses
        ),
        grace=Grace(
            config.run.stop_grace_s if mode.trains_on_newest else None,  # other modes hand their answers out once
            waits=session.in_other_processes and not config.cluster.colocate,
        ),
    )


def make_rewards(
    config: PpoConfig,
    groups: Groups,
    chat: ChatFormat,
    ends: EndTokens,
    prompts: Split[TokenizedPrompt],
    cleanup: ExitStack,
    judges: Path,
) -> RewardSource:
    """The source of rewards; where it cannot be made, nothing that was opened for it stays open."""
    with ExitStack() as opened:
        source = make_reward_source(
            config,
            groups.rewards,
            chat,
            forms=prompt_forms(prompts),
            cleanup=opened,
            stop_tokens=ends.ids,
            judges=judges,
        )
        cleanup.push(opened.pop_all())
    return source


def watch_engines(health: FleetHealth, run: RunDirectory, journal: Journal) -> None:
    """Keep how the engines are for others to read, count their deaths, and let the alarms see which are down."""
    health.on_change = lambda: run.engines.write(health.plain())
    health.on_death = partial(events.count, "rollout/engine_deaths")
    journal.alarms.engines_down = lambda: float(len(health.in_state(*DOWN)))
    health.on_change()


def start_fleet(
    config: PpoConfig,
    run: RunDirectory,
    session: Session,
    starting: Starting,
    policy: PolicyGroup,
    engines: list[Ranks],
    ends: EndTokens,
    *,
    goes_on: bool,
) -> Fleet:
    """Start the engines from what the policy writes, which have no weights before the first publication.

    Refuses engines that do not compute log-probs as the policy does, and a run that would go on with others than before.
    """
    start_directory = run.path / "rollout-start"
    shapes = starting.surviving(lambda: policy.save_without_weights(str(start_directory)).result())
    takes_turns = config.cluster.colocate
    record = starting.surviving(lambda: policy.execution().result())
    setup = RolloutSetup(
        config.rollout.model_copy(update={"sleep": True}) if takes_turns else config.rollout,
        str(start_directory),
        ends.ids,
        config.run.seed,
        config.run.deterministic,
        takes_turns=takes_turns,
        execution=record,
        shapes=shapes,  # PpoTrainer.start publishes them before anything is sampled
        adapter_rank=starting.surviving(policy.adapter_rank) if config.rollout.lora == "adapter" else None,
    )
    fleet = session.fleet(engines, setup, starting.load)
    of_engines = fleet.require_agreement(record)
    keep_execution(run.execution_path, {"policy": record, "rollout": of_engines}, goes_on=goes_on)
    get_logger("ppo").info("policy and engines keep to one execution contract, %s", digest(record, of_engines))
    return fleet


def make_mode(
    config: PpoConfig, collector: Collector, prompts: PromptStream, sampler: Sampler, engines: Sequence[Ranks]
) -> Mode:
    """The mode that ``rollout.mode`` names, which decides when ``collector`` is asked."""
    if config.rollout.mode == "sync":
        return Sync(collector, prompts)

    def stop_engines() -> None:
        sampler.fleet.stop()  # first, or it would restart them
        for engine in engines:
            engine.stop()

    if config.rollout.mode == "windowed":
        return Windowed(config, sampler, prompts, stop_engines)
    return OneStepOff(config, collector, prompts, stop_engines)


def make_player(config: PpoConfig, chat: ChatFormat, ends: EndTokens, cleanup: ExitStack) -> EpisodePlayer | None:
    """What plays the episodes of the run's environment, in a process that ``cleanup`` ends; none where there is none."""
    settings = config.rollout.environment
    if settings is None:
        return None
    process = EnvironmentProcess(settings.name, settings.parameters, settings.timeout_s)
    cleanup.callback(process.close)
    limits = Limits(settings.max_turns, config.rollout.max_model_tokens)
    return EpisodePlayer(process, Bridge(chat), limits, ends.ids, settings.name)


def keep_set_aside(fleet: Fleet, run: RunDirectory, tokenizer: Any) -> None:
    """Have the run remember, with its text, each prompt that ``fleet`` sets aside, and not try those of before again."""
    fleet.set_aside |= run.set_aside.ids()

    def keep(aside: SetAside) -> None:
        run.set_aside.add(aside.prompt_id, tokenizer.decode(aside.token_ids), aside.causes)

    fleet.on_set_aside = keep


def start_groups(config: PpoConfig, session: Session, starting: Starting, updates: int) -> tuple[Groups, list[Ranks]]:
    """The model groups, loaded, and the rollout engines, placed but not loaded; ``updates`` are those of the whole run.

    Every process is placed before the first model is loaded, so that all load at once.
    """
    temperature = config.rollout.temperature
    placed: dict[str, PlacedGroup[Any]] = {
        "policy": session.policy(config.policy, total_updates=updates, temperature=temperature)
    }
    if config.critic is not None:
        placed["critic"] = session.critic(config.critic, total_updates=updates)
    if config.reference_role is not None:
        placed["reference"] = session.reference(config.reference_role, temperature=temperature)
    rewards = {
        key: session.reward(
            role,
            max_tokens=role.forward_tokens(config.batch),
            max_item_tokens=config.rollout.max_model_tokens,
            name=group_of(key),
        )
        for key, role in config.reward.roles.items()
    }
    engines = session.engines(config.rollout)
    loaded = starting.groups(placed | rewards)
    groups = {role: loaded[role] for role in placed}
    return Groups(config, **groups, rewards={key: loaded[key] for key in rewards}), engines
