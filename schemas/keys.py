"""Names of the streams and of the consumer group, derived from one prefix."""

from pydantic import BaseModel, ConfigDict


class StreamKeys(BaseModel):
    """The three streams of one service, and the group that its workers form.

    Attributes:
        prefix: What every key starts with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str = "flawstream"

    @property
    def images(self) -> str:
        """Name the stream that producers write and workers read."""
        return f"{self.prefix}:images"

    @property
    def results(self) -> str:
        """Name the stream that workers write and consumers read."""
        return f"{self.prefix}:results"

    @property
    def dead(self) -> str:
        """Name the stream of the refused."""
        return f"{self.prefix}:dead"

    @property
    def group(self) -> str:
        """Name the consumer group of the workers on the images stream."""
        return "workers"
