"""What the commands that read data sets share: their options."""

from typing import Annotated

import typer

from training.datasets.open import Layout

LayoutOption = Annotated[
    Layout, typer.Option("--layout", help="How the data set lies on disk; auto looks for each layout's marks.")
]
