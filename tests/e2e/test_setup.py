"""`make setup` refuses a file that is not the one that was pinned."""

import base64
import ensurepip
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from helpers.places import ROOT


def write_wheel(folder: Path) -> str:
    """Write a package `part` of one empty module; return the digest of its wheel."""
    empty = base64.urlsafe_b64encode(hashlib.sha256(b"").digest()).rstrip(b"=").decode()
    files = {
        "part.py": "",
        "part-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: part\nVersion: 1\n",
        "part-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "part-1.dist-info/RECORD": f"part.py,sha256={empty},0\n",
    }
    path = folder / "part-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_make_setup_refuses_a_file_with_another_hash(tmp_path: Path) -> None:
    digest = write_wheel(tmp_path)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    offline = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PYTHONPATH": ""}

    def set_up(digest: str) -> tuple[str, bool]:
        """Run it with a pin; return its errors, and whether the package is installed."""
        pins = ("part==1", f"pip=={ensurepip.version()}")  # pip of this version is there already
        (tmp_path / "constraints.txt").write_text("".join(f"{pin} --hash=sha256:{digest}\n" for pin in pins))
        command = ["make", "setup", f"PYTHON={sys.executable}"]
        ran = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)  # noqa: S603 - ours
        return ran.stderr, list(tmp_path.glob(".venv/lib/*/site-packages/part.py")) != []

    errors, installed = set_up("0" * 64)
    assert "DO NOT MATCH THE HASHES" in errors
    assert not installed
    assert set_up(digest)[1]
