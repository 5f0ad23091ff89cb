"""The models that a node offers: by its settings, and by what its MLX server reports and answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Sequence

from fleet_worker.errors import ConfigurationError
from fleet_worker.mlx.offering import Offering, no_offerings_advice, offerings_of
from fleet_worker.mlx.profiles import PROFILES, lacks_template
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)


class OfferedModels:
    """The offerings of one instance, in `by_name`: replaced as a whole, never changed in place. Safe for all threads.

    `server` is the kind of the MLX server, a key of `PROFILES`; `reported` are the models that the server lists.

    Raises:
        ConfigurationError: the instance has nothing to offer.
    """

    def __init__(self, settings: Settings, instance: str, server: str, reported: Sequence[str]) -> None:
        self._instance = instance
        self._profile = PROFILES[server]
        self._lock = threading.Lock()
        self._reported = reported
        self._missing: frozenset[str] = frozenset()
        self._without_template: set[str] = set()
        self.by_name: dict[str, Offering] = {}
        self.follow_settings(settings)

    @property
    def available(self) -> dict[str, Offering]:
        """The offerings whose model the server has, as far as is known."""
        missing = self._missing
        return {name: offering for name, offering in self.by_name.items() if name not in missing}

    def follow_settings(self, settings: Settings) -> None:
        """Offer what these settings say.

        Raises:
            ConfigurationError: that would be nothing; the offerings stay as they are.
        """
        with self._lock:
            instance = settings.instances[self._instance]
            offerings = offerings_of(instance, settings.features, self._reported)
            if not offerings:
                advice = no_offerings_advice(f"instances.{self._instance}", instance)
                raise ConfigurationError(f"instance {self._instance} has nothing to offer: {advice}")
            self._settings = settings
            self._missing -= offerings.keys()
            self._replace(offerings)

    def follow_server(self, reported: Sequence[str]) -> None:
        """Offer what the server reports now. An empty list changes nothing: it may be a fault of the server."""
        with self._lock:
            self._reported = reported
            instance = self._settings.instances[self._instance]
            if offerings := offerings_of(instance, self._settings.features, reported):
                self._replace(offerings)
            if instance.models and reported and self._profile.lists_models:
                there = {name for name, offering in self.by_name.items() if offering.backend in reported}
                self._missing = (self._missing - there) | (self.by_name.keys() - there)

    def lacks(self, model: str) -> None:
        """Offer this model no more: the server answered that it does not have it."""
        with self._lock:
            self._missing |= {model}

    def forget_missing(self) -> None:
        """Offer all models again: the server was away, and another one may have taken its place."""
        with self._lock:
            self._missing = frozenset()

    def for_canary(self, loaded: Container[str] = ()) -> Offering | None:
        """Return an available offering whose backend is in `loaded`, else the first one: with any other, the server
        might have to swap models."""
        available = self.available.values()
        return next((each for each in available if each.backend in loaded), next(iter(available), None))

    def _replace(self, offerings: dict[str, Offering]) -> None:
        """Warn once of each model without a chat template, and again if it was found and is missing again."""
        self.by_name = offerings
        without = {name for name, offering in offerings.items() if lacks_template(offering, self._profile)}
        for model in sorted(without - self._without_template):
            log.warning(
                "no chat template of %s is found, so streams of it that broke off elsewhere go on here only at "
                "temperature 0: fleet-worker doctor says what to do",
                model,
            )
        self._without_template = without
