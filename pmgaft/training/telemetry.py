"""Where a run's figures go for machines that watch: TensorBoard files, and a page that Prometheus reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from pmgaft.errors import InputError

_NOT_PLOTTED = {"step", "progress", "seconds", "seconds_left"}


class TensorBoard:
    """Writes every step's and every judgement's figures to a directory: `tensorboard --logdir` shows them.

    Raises: InputError where the package tensorboard is missing.
    """

    def __init__(self, directory: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError('--tensorboard needs the package tensorboard: pip install "pmgaft[train]"')
        self._directory = directory
        self._writer: Any = None

    def show(self, event: str, figures: dict[str, Any]) -> None:
        """Told every event of the run; what a resumed run does anew replaces what was there."""
        if event in ("start", "resume"):
            from torch.utils.tensorboard import SummaryWriter  # here: it takes seconds to import

            writer: Any = SummaryWriter
            self._writer = writer(str(self._directory), purge_step=figures.get("step", 0))
        elif event == "step":
            for name in figures.keys() - _NOT_PLOTTED:
                self._writer.add_scalar(f"train/{name}", figures[name], figures["step"])
        elif event == "judged":
            for name in ("clean", "robust"):
                self._writer.add_scalar(f"held_out/{name}_accuracy", figures[name], figures["step"])
        elif event == "end":
            self._writer.close()


class Metrics:
    """The run's newest figures as Prometheus gauges, served at http://HOST:port/metrics until the process ends.

    port: 0 takes any that is free; `port` says which. Raises: InputError where it is taken.
    """

    def __init__(self, port: int) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"pmgaft_train_{name}", meaning, labels, registry=registry)

        self._info = gauge("info", "What is trained; always 1.", "model", "data", "device", "ranks")
        self._step = gauge("step", "Optimiser steps done.")
        self._progress = gauge("progress_ratio", "Share of the run that is over.")
        self._left = gauge("seconds_left", "Estimated time until the end.")
        self._loss = gauge("loss", "Weighted sum of the loss terms.")
        self._terms = gauge("loss_term", "One term of the loss, unweighted.", "term")
        self._accuracy = gauge("accuracy_ratio", "Share answered rightly.", "images", "attacked")
        self._rate = gauge("learning_rate", "Of the newest step.")
        self._eps = gauge("eps", "Radius of the training attack, pixel units.")
        self._speed = gauge("images_per_second", "Since the last report.")
        self._checkpoint = gauge("checkpoint_step", "Step of the newest checkpoint.")
        try:
            server, _ = start_http_server(port, registry=registry)
        except OSError as error:
            raise InputError(f"--metrics-port {port} cannot be listened on: {error.strerror}") from error
        self.port: int = server.server_port

    def show(self, event: str, figures: dict[str, Any]) -> None:
        """Told every event of the run."""
        if event in ("start", "resume"):
            self._info.labels(*(str(figures[key]) for key in ("model", "data", "device", "ranks"))).set(1)
            self._step.set(figures.get("step", 0))
        elif event == "step":
            self._show_step(figures)
        elif event == "judged":
            self._accuracy.labels("held_out", "no").set(figures["clean"])
            self._accuracy.labels("held_out", "yes").set(figures["robust"])
        elif event == "checkpoint":
            self._checkpoint.set(figures["step"])

    def _show_step(self, figures: dict[str, Any]) -> None:
        gauges = {
            "step": self._step,
            "progress": self._progress,
            "seconds_left": self._left,
            "loss": self._loss,
            "lr": self._rate,
            "eps": self._eps,
            "images_per_second": self._speed,
            "clean_accuracy": self._accuracy.labels("batch", "no"),
            "robust_accuracy": self._accuracy.labels("batch", "yes"),
        }
        for name, value in figures.items():
            if name in gauges:
                gauges[name].set(value)
            elif name.startswith("loss_"):
                self._terms.labels(name.removeprefix("loss_")).set(value)
