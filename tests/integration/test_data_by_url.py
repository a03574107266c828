"""Data sets on S3, from a real server of its protocol on loopback, through the commands that take one."""

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import s3fs
from helpers.command_line import Run, make_run
from helpers.image_files import write_images
from helpers.s3_server import point_to, running_s3

from flawstream.engines.choose import make_local_engine
from flawstream.engines.protocol import Engine
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.data_sets import exclude_faulty
from schemas.errors import DatasetError
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, Settings, TrainingSettings
from training.datasets.local_copy import LocalCopy
from training.datasets.open import open_dataset
from training.groups import run_group
from training.pipeline import TrainingJob
from training.remote_data import run_on_copy
from training.steps.features import FeatureExtractor

BUCKET = "photos"
MODEL = ModelSettings(strides=(16, 32), input_size=64, flow_steps=2, hidden_ratio=0.2)
RECIPE = TrainingSettings(epochs=1, batch_size=4, false_alarm_rate=0.4)


@pytest.fixture
def s3_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the address of a server with an empty bucket, which S3's clients of this process ask."""
    with running_s3() as address:
        point_to(monkeypatch, address)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield address


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of two categories, one of which has test images."""
    for category in ("bottle", "cable"):
        write_images(tmp_path / "data" / category / "train" / "good", 12)
    write_images(tmp_path / "data" / "bottle" / "test" / "good", 3)
    write_images(tmp_path / "data" / "bottle" / "test" / "hole", 3)
    return tmp_path / "data"


def upload(folder: Path) -> str:
    client = boto3.client("s3")
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), BUCKET, f"data/{file.relative_to(folder)}")
    return f"s3://{BUCKET}/data"


def count_requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the requests of S3's client by kind."""
    requests: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3  # noqa: SLF001 - the one place through which all requests go

    async def counted(self: s3fs.S3FileSystem, method: str, *args: object, **kwargs: object) -> object:
        requests[method] += 1
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    return requests


@pytest.mark.usefixtures("s3_address")
def test_url_lists_the_same_as_the_folder_with_one_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(folder)
    requests = count_requests(monkeypatch)
    by_url, local = open_dataset(f"{url}/"), open_dataset(folder)
    assert requests == {"list_objects_v2": 1}
    for one, other in zip(by_url, local, strict=True):
        assert one.name == other.name
        assert [str(path) for path in one.files()] == [f"{url}/{path.relative_to(folder)}" for path in other.files()]


@pytest.mark.usefixtures("s3_address")
def test_check_reads_each_file_once_and_finds_the_same_as_in_the_folder(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "bottle" / "train" / "good" / "005.png").write_bytes(b"not an image")
    url = upload(folder)
    requests = count_requests(monkeypatch)
    by_url = run("datasets", "check", url, "--json")
    assert requests == {"list_objects_v2": 1, "get_object": 30}
    local = run("datasets", "check", folder, "--json")
    assert by_url.code == local.code == 1
    assert json.loads(by_url.out) == json.loads(local.out.replace(str(folder), url))


@pytest.mark.usefixtures("s3_address")
def test_list_names_images_by_their_key_beside_it(folder: Path) -> None:
    rows = "".join(f"bottle,train,good,bottle/train/good/{number:03}.png\n" for number in range(12))
    (folder / "list.csv").write_text(f"category,split,label,image\n{rows}")
    (data,) = open_dataset(f"{upload(folder)}/list.csv")
    with LocalCopy(data) as copy:
        assert list(copy.fill()) == list(range(1, 13))
        assert copy.data.sha256() == data.sha256() == open_dataset(folder / "list.csv")[0].sha256()


@pytest.mark.usefixtures("s3_address")
def test_missing_image_of_a_list_is_found_by_listing_its_folder(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(folder / "more", 40)
    rows = "".join(f"bottle,train,good,more/{number:03}.png\n" for number in range(41))
    (folder / "list.csv").write_text(f"category,split,label,image\n{rows}")
    url = upload(folder)
    requests = count_requests(monkeypatch)
    ran = run("datasets", "check", f"{url}/list.csv", "--json")
    (finding,) = [each for each in json.loads(ran.out)["findings"] if each["severity"] == "error"]
    assert (finding["problem"], finding["path"]) == ("missing_file", f"{url}/more/040.png")
    assert requests["head_object"] + requests["list_objects_v2"] <= 20  # for the list, and not for each image
    assert requests["get_object"] == 41


@pytest.mark.usefixtures("s3_address")
def test_copy_ends_with_its_context_and_one_of_a_dead_process_is_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    left = tmp_path / "scratch" / "flawstream-data-left"
    left.mkdir(parents=True)
    (left / "0.png").touch()
    data = open_dataset(upload(folder), ["cable"])
    with LocalCopy(data[0]) as copy, LocalCopy(data[0]) as other:
        for each in (copy, other):
            assert list(each.fill())[-1] == 12
        assert not left.exists()
        assert all(path.is_file() for path in (*copy.data.train, *other.data.train))
        assert copy.with_urls(f"{copy.data.train[0]}: damaged") == f"{data[0].train[0]}: damaged"
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("s3://no-such-bucket/data", "does not exist: there is no such bucket"),
        (f"s3://{BUCKET}/nothing", "does not exist: there is no such bucket, or nothing has this name"),
        (f"s3://{BUCKET}/nothing.csv", "does not exist"),
        ("s4://bucket/data", "neither a path nor a URL that fsspec knows"),
    ],
)
@pytest.mark.usefixtures("s3_address")
def test_wrong_url_is_refused_with_the_cure(run: Run, url: str, cure: str) -> None:
    ran = run("train", url)
    assert ran.code == 3
    assert url in ran.err
    assert cure in ran.err
    assert ran.err.count("\n") == 1


def test_credentials_without_rights_are_refused_with_the_cure(folder: Path, run: Run, s3_address: str) -> None:
    url = upload(folder)
    ask = urllib.request.Request(  # noqa: S310 - the test's own server: from now on it asks for rights
        f"{s3_address}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
    )
    with urllib.request.urlopen(ask):  # noqa: S310
        pass
    try:
        ran = run("datasets", "check", url)
    finally:
        restore = urllib.request.Request(  # noqa: S310
            f"{s3_address}/moto-api/reset-auth", b"inf", {"Content-Type": "text/plain"}, method="POST"
        )
        with urllib.request.urlopen(restore):  # noqa: S310
            pass
    assert ran.code == 3
    assert f"{url} must not be read with the credentials found here" in ran.err
    assert "AWS_ACCESS_KEY_ID" in ran.err


def test_storage_that_is_away_is_refused_with_the_cure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    ran = run("evaluate", "s3://photos/data")
    assert ran.code == 3
    assert "the storage of s3://photos/data failed: EndpointConnectionError" in ran.err
    assert "AWS_ENDPOINT_URL" in ran.err


@pytest.mark.usefixtures("s3_address")
def test_file_that_vanishes_after_the_listing_is_named(folder: Path) -> None:
    data = open_dataset(upload(folder), ["cable"])[0]
    boto3.client("s3").delete_object(Bucket=BUCKET, Key="data/cable/train/good/003.png")
    with (
        LocalCopy(data) as copy,
        pytest.raises(DatasetError, match=f"s3://{BUCKET}/data/cable/train/good/003.png does"),
    ):
        list(copy.fill())


@pytest.fixture(scope="module")
def trainer() -> tuple[FeatureExtractor, Engine]:
    """Give what a trainer has: a backbone and the engine that serves."""
    backbone = Backbone(MODEL)
    return FeatureExtractor(backbone, LimitSettings(), threads=1), make_local_engine(
        DetectorSettings(), lambda: backbone, 1
    )


@pytest.mark.usefixtures("s3_address")
def test_training_and_evaluation_by_url_equal_those_of_the_folder_and_read_each_image_once(
    folder: Path, tmp_path: Path, run: Run, trainer: tuple[FeatureExtractor, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(folder)
    manifests = []
    for root, registry in ((url, tmp_path / "by_url"), (folder, tmp_path / "local")):
        (data,) = open_dataset(root, ["bottle"])
        requests = count_requests(monkeypatch)
        *_, last = run_group([TrainingJob(data, MODEL, RECIPE, str(registry))], *trainer)
        assert last.manifest is not None
        assert requests == ({"get_object": 18} if root == url else {})
        manifests.append(last.manifest)
        Registry(str(registry)).promote("bottle", last.manifest.version)
    assert manifests[0].files["flow.safetensors"] == manifests[1].files["flow.safetensors"]
    assert manifests[0].calibration == manifests[1].calibration
    assert manifests[0].training.dataset_sha256 == manifests[1].training.dataset_sha256

    report = tmp_path / "report.html"
    arguments = ("--registry", tmp_path / "local", "-c", "bottle", "--json", "--images")
    evaluated = run("evaluate", url, *arguments, "--report", report)
    assert json.loads(evaluated.out) == json.loads(run("evaluate", folder, *arguments).out.replace(str(folder), url))
    assert report.stat().st_size > 10_000


@pytest.mark.usefixtures("s3_address")
def test_damaged_image_is_found_by_the_trainer_and_named_by_its_url(
    folder: Path, tmp_path: Path, trainer: tuple[FeatureExtractor, Engine]
) -> None:
    damaged = folder / "cable" / "train" / "good" / "005.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    url = upload(folder)
    data = open_dataset(url)
    sound, faulty = exclude_faulty(data, Settings(), decode=True, strict=False)
    assert (sound, faulty) == (data, {})  # not decoded here
    with pytest.raises(DatasetError, match=f"errors: 1, the first: {url}/cable/train/good/005.png: "):
        list(run_on_copy(TrainingJob(data[1], MODEL, RECIPE, str(tmp_path / "models")), *trainer))
    with pytest.raises(DatasetError, match="nothing is trained"):
        exclude_faulty(data, Settings(), decode=True, strict=True)
