"""What a Prometheus server would have found: text of a scrape, or a registry, asked by name and labels."""

import urllib.request
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from helpers.waiting import wait_until


class Scraped:
    """The samples of one scrape."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._samples = [sample for family in families for sample in family.samples]

    def matching(self, name: str, **labels: str) -> Iterator[Sample]:
        """Give the samples of a name that have these labels, whatever others they have."""
        for sample in self._samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample

    def total(self, name: str, **labels: str) -> float:
        """Sum the samples of a name that have these labels; 0 where there is none."""
        return sum(sample.value for sample in self.matching(name, **labels))

    def most(self, name: str, **labels: str) -> float | None:
        """Give the highest of them; None where there is none."""
        return max((sample.value for sample in self.matching(name, **labels)), default=None)

    def names(self) -> set[str]:
        """Name all samples."""
        return {sample.name for sample in self._samples}


def scrape(url: str) -> Scraped:
    """Ask an endpoint, as a Prometheus server does."""
    with urllib.request.urlopen(url) as answer:  # noqa: S310 - of the test's own server
        return Scraped(text_string_to_metric_families(answer.read().decode()))


def collected(registry: CollectorRegistry) -> Scraped:
    """Look into a registry of this process."""
    return Scraped(registry.collect())


def scrape_until(
    url: str,
    is_so: Callable[[Scraped], bool],
    explain: Callable[[Scraped], object] = Scraped.names,
    *,
    every_s: float = 0.05,
) -> Scraped:
    """Scrape until it is so.

    Args:
        url: What is scraped.
        is_so: Whether it is so.
        explain: What to say of the last scrape where it never was.
        every_s: How long between two scrapes.
    """
    last: list[Scraped] = []

    def look() -> Scraped | None:
        last[:] = [scrape(url)]
        return last[0] if is_so(last[0]) else None

    return wait_until(look, lambda: explain(last[0]), every_s=every_s)
