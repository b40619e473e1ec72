"""Puts one run together: data, model, method, sessions, recorder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mergesfl.config import RunConfig
from mergesfl.control.estimates import AffineEstimates, Estimates
from mergesfl.data import load_dataset
from mergesfl.data.dataset import Dataset
from mergesfl.errors import ConfigError
from mergesfl.methods import CENTRAL, check_streaming, find_method
from mergesfl.methods.base import MethodSettings
from mergesfl.methods.split_program import check_parts
from mergesfl.models import build_model
from mergesfl.protocol.coding import RunCodecs
from mergesfl.protocol.messages import Welcome
from mergesfl.runtime.clock import Clock
from mergesfl.runtime.devices import resolve_device
from mergesfl.runtime.patience import REAL, Patience
from mergesfl.seeding import seed_for
from mergesfl.training.dropout import has_dropout
from mergesfl.training.evaluation import Evaluation, evaluate
from mergesfl.training.placement import place
from mergesfl.training.split import SplitModel
from mergesfl.transport.base import ServerEndpoint
from ps.evaluator import BackgroundEvaluator, Evaluate, Evaluator
from ps.fleet import Fleet
from ps.progress import Progress
from ps.recorder import Recorder
from ps.server import Server
from ps.survey import FleetSurvey, Questions
from ps.switchboard import Switchboard

log = logging.getLogger("ps")


def method_settings(config: RunConfig, sample_shape: tuple[int, ...]) -> MethodSettings:
    """The part of the configuration that a method turns on."""
    training, control = config.training, config.control
    return MethodSettings(
        seed=config.seed,
        num_steps=training.local_steps,
        batch_size=training.batch_size,
        participants_per_round=control.participants_per_round or config.cluster.num_workers,
        learning_rate=training.learning_rate,
        learning_rate_decay=training.learning_rate_decay,
        learning_rate_min=training.learning_rate_min,
        sample_shape=sample_shape,
        merging=config.method.merging,
        regulation=config.method.regulation,
        adapt_local_steps=config.method.adapt_local_steps,
        top_momentum=config.method.top_momentum,
        logit_adjustment=config.method.logit_adjustment,
        proximal=config.method.proximal,
        model_averaging=config.method.model_averaging,
        bottom_learning_rate=training.bottom_learning_rate,
        ingress_budget_bytes=control.ingress_budget_bytes,
        max_participants=control.max_participants,
        search=control.search,
        reference=control.reference,
        kl_epsilon_nats=control.kl_epsilon_nats,
        idle_weight_nats=control.idle_weight_nats,
        priority_weight_nats=control.priority_weight_nats,
        fill_budget=control.fill_budget,
        allow_above_max=control.allow_above_max,
    )


@dataclass(frozen=True)
class Scene:
    """What every run needs, with or without workers."""

    config: RunConfig
    dataset: Dataset
    network: SplitModel
    device: torch.device
    clock: Clock
    recorder: Recorder
    progress: Progress

    def evaluate(self, network: SplitModel) -> Evaluation:
        """Judges a network on the test set, in batches."""
        test, size = self.dataset.test, self.config.training.evaluation_batch_size
        batches = (
            (
                self.dataset.scale.to_input(test.x[begin : begin + size]),  # (B, *sample)
                torch.from_numpy(test.y[begin : begin + size]),  # (B,)
            )
            for begin in range(0, len(test.y), size)
        )
        return evaluate(network, batches, self.dataset.num_classes, self.device)


def build_network(config: RunConfig, dataset: Dataset) -> SplitModel:
    """The network of the configuration for this data set; its weights are a pure function of the seed."""
    return build_model(
        config.model.name,
        config.model.cut,
        dataset.sample_shape,
        dataset.num_classes,
        seed_for(config.seed, "weights"),
    )


def run_codecs(config: RunConfig) -> RunCodecs:
    """What features, gradients and states are on the wire."""
    return RunCodecs(config.seed, config.codec.features, config.codec.gradients, config.codec.weights)


def require_extras(config: RunConfig) -> None:
    """What a run needs beyond the core install, looked for before it starts and not after it has trained.

    Raises ConfigError naming the package and the extra.
    """
    needs = {"safetensors": "checkpoints", **({"matplotlib": "pictures"} if config.output.plots else {})}
    for package, purpose in needs.items():
        if importlib.util.find_spec(package) is None:
            spare = " or set output.plots=false" if package == "matplotlib" else ""
            raise ConfigError(f"{package} is not installed ({purpose}): pip install 'mergesfl[ps]'{spare}")
    if config.output.tensorboard and importlib.util.find_spec("tensorboard") is None:
        log.warning("tensorboard is not installed, no events are written: pip install 'mergesfl[ps]'")


def set_scene(config: RunConfig, partition: str, clock: Clock, progress: Progress) -> Scene:
    """Loads data and model. Raises ConfigError, DataError before anything else has started."""
    require_extras(config)
    if config.method.name != CENTRAL:
        find_method(config.method.name)
    device = resolve_device(config.cluster.device)
    dataset = load_dataset(
        config.data.dataset, download=config.data.download, image_size_pixels=config.data.image_size_pixels
    )
    network = build_network(config, dataset)
    if config.training.merge != "barrier" and config.method.name != CENTRAL:
        check_streaming(config.method.name, network, method_settings(config, dataset.sample_shape))
        check_parts(network, config.training.parts_per_step)
        if has_dropout(network.top):
            log.warning(
                "training.merge = '%s' draws the top's dropout masks for each worker and part on its own, where the "
                "barrier may draw them over the merged batch: as good, but other numbers than with 'barrier'",
                config.training.merge,
            )
    sample_bytes = run_codecs(config).feature_bytes(network.feature_shape(dataset.sample_shape))
    if (config.control.ingress_budget_bytes or sample_bytes) < sample_bytes:
        raise ConfigError(
            f"ingress budget of {config.control.ingress_budget_bytes} bytes per step is less than one sample at the "
            f"cut, {sample_bytes} bytes: raise control.ingress_budget_bytes or cut where features are smaller"
        )
    recorder = Recorder(config, dataset, partition, progress)
    return Scene(config, dataset, place(network, device), device, clock, recorder, progress)


def no_charge(num_samples: int) -> None:
    """On a real clock computing takes its time by itself."""


def serve(
    scene: Scene,
    endpoint: ServerEndpoint,
    resume: bool,
    check: Callable[[], None],
    patience: Patience = REAL,
    charge: Callable[[int], None] = no_charge,
    make_evaluator: Callable[[Evaluate, Clock], Evaluator] = BackgroundEvaluator,
) -> dict[str, Any]:
    """Runs the parameter server on an endpoint that is already bound; closes it. Returns the summary.

    make_evaluator: a real run evaluates beside its next round; one thread is enough for one whose clock is not real.
    """
    config, network, dataset = scene.config, scene.network, scene.dataset
    feature_shape, codecs = network.feature_shape(dataset.sample_shape), run_codecs(config)
    max_workers = 10 * config.cluster.num_workers + 1000  # room for workers that come and go [ours]
    fleet = Fleet(
        dataset.class_names,
        dataset.sample_shape,
        Estimates(config.control.estimate_memory),
        max_workers,
        AffineEstimates(config.control.estimate_memory),
        config.control.time_model,
        config.control.reference,
    )
    welcome = Welcome(
        config.model.name,
        network.cut,
        dataset.class_names,
        dataset.sample_shape,
        config.seed,
        stored_type=dataset.train.x.dtype.name,
        **asdict(dataset.scale),
        feature_codec=config.codec.features,
        gradient_codec=config.codec.gradients,
        weight_codec=config.codec.weights,
    )
    switchboard = Switchboard(
        endpoint,
        fleet,
        welcome,
        codecs.feature_bytes(feature_shape),
        check,
        scene.clock,
        config.cluster.start_deadline_seconds,
        patience,
    )
    settings = method_settings(config, dataset.sample_shape)
    method = find_method(config.method.name)
    parts_per_step = config.training.parts_per_step
    questions = Questions.of(network, settings, feature_shape, method.splits, codecs, parts_per_step)
    survey = FleetSurvey(questions, config.control, fleet, switchboard, scene.clock)
    program = method.make_server(network, settings, scene.device)
    evaluator = make_evaluator(scene.evaluate, scene.clock)
    reason = "the parameter server stopped"
    try:
        server = Server(
            config,
            program,
            fleet,
            switchboard,
            scene.recorder,
            scene.progress,
            scene.clock,
            feature_shape,
            codecs,
            survey,
            evaluator,
            scene.device,
            charge,
        )
        summary = server.run(resume)
        reason = "the run is complete"
    finally:
        switchboard.say_goodbye(reason)
        switchboard.close()
        evaluator.close()
        scene.recorder.close()
    return summary
