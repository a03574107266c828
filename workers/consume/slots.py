"""The slots for batches in flight: a semaphore whose size can change."""

import asyncio


class Slots(asyncio.Semaphore):
    """Lets so many batches be in flight at once.

    Args:
        number: How many.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self._number = number
        self._surplus = 0

    def resize(self, number: int) -> None:
        """Change their number. Where they become fewer, batches in flight finish, and none takes their place."""
        change = number - self._number
        self._number = number
        for _ in range(change):
            self.release()
        self._surplus += max(0, -change)

    def release(self) -> None:
        """Free a slot, or take it away where there are too many."""
        if self._surplus:
            self._surplus -= 1
        else:
            super().release()
