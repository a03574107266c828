"""Starts a run or finds the one to continue: lists the images and pins the versions that judge them."""

from datetime import UTC, datetime
from importlib.metadata import version

from flawstream.registry.registry import Registry
from schemas.errors import ConfigError, UnknownCategoryError
from serving.engines import newest_manifest
from serving.scoring.listing import Source, list_images
from serving.scoring.output import Output, Run, RunParameters
from serving.scoring.scorer import PinnedRegistry


def open_run(output: Output, parameters: RunParameters, *, again: bool) -> tuple[Run, bool]:
    """Start a run, or find the one to continue.

    Args:
        output: The folder of the run.
        parameters: What the run is started with.
        again: Remove the results of an earlier run first.

    Returns:
        The run, and whether it was there before.

    Raises:
        ConfigError: The folder has results of other parameters or other files, or the images cannot be listed.
        RegistryError: No category of the listing has a current version, or one cannot be read.
    """
    if again:
        output.clear()
    run = output.read_run()
    if run is not None:
        _refuse_other_parameters(output, run.parameters, parameters)
        newest_manifest(PinnedRegistry(parameters.registry, run.versions))
        return run, True
    if output.has_other_files() or output.finished():
        raise ConfigError(
            f"{output.url} has files and none says of which run they are; choose another --out, or remove the parts of "
            "an earlier run with --again"
        )
    output.clear()  # a listing that was not completed
    run = _start(output, parameters)
    output.write_run(run)
    return run, False


def _start(output: Output, parameters: RunParameters) -> Run:
    currents = Registry(parameters.registry).currents()
    if parameters.category is not None and parameters.category not in currents:
        raise _unknown(parameters, {parameters.category}, currents)
    source = Source(parameters.url, parameters.suffixes, parameters.category, parameters.category_from)
    images, digest, categories = output.write_listing(list_images(source), parameters.images_per_part)
    if not images:
        raise ConfigError(f"no images at {parameters.url}; looked for {', '.join(parameters.suffixes)}")
    versions = {name: current for name, current in currents.items() if name in categories}
    if not versions:
        raise _unknown(parameters, categories, currents)
    newest_manifest(PinnedRegistry(parameters.registry, versions))
    return Run(
        parameters=parameters,
        versions=versions,
        images=images,
        listing_sha256=digest,
        listed_at=datetime.now(UTC),
        flawstream=version("flawstream"),
    )


def _unknown(parameters: RunParameters, categories: set[str], currents: dict[str, str]) -> UnknownCategoryError:
    wanted = ", ".join(repr(name[:64]) for name in sorted(categories)[:10])
    known = ", ".join(sorted(currents)[:10]) or "none yet"
    return UnknownCategoryError(
        f"no current version in {parameters.registry} of {wanted}; it has: {known}. Train it with `flawstream train`, "
        "or correct --category or --category-from"
    )


def _refuse_other_parameters(output: Output, ours: RunParameters, given: RunParameters) -> None:
    before, now = ours.model_dump(mode="json"), given.model_dump(mode="json")
    different = [f"{name} was {before[name]!r} and is {now[name]!r}" for name in before if before[name] != now[name]]
    if different:
        raise ConfigError(
            f"{output.url} has results of another run: {'; '.join(different)}. Choose another --out, or remove those "
            "results and start anew with --again"
        )
