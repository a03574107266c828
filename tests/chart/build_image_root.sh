#!/usr/bin/env bash
# Build the image's file tree without Docker: a bare Debian, the very scripts that the Dockerfile runs, two stages.
#   build_image_root.sh FOLDER        leaves FOLDER/root, what a container of the CPU target would see
# Needs root and debootstrap; takes minutes, 16 GB and the package index. Python is Debian's 3.11, where the base image has a
# newer patch release of 3.11: there is no registry of images here to take that from.
# DEBIAN_MIRROR names another mirror; IMAGE_LEND, folders of this machine that pip's configuration names, to be mounted.
set -euo pipefail

readonly folder=$(realpath -m "${1:?which folder?}")
readonly docker=k8s/docker
readonly stamp="$folder/.complete"
readonly script=$(realpath "$0")
cd "$(dirname "$script")/../.."
[ "$(id -u)" = 0 ] || { echo "building a root needs root: sudo make test-image" >&2; exit 3; }
command -v debootstrap >/dev/null || { echo "debootstrap is missing; on Debian: apt-get install debootstrap" >&2; exit 3; }

in_root() { # in_root ROOT COMMAND...: with the network, and what pip was told outside
  local root=$1; shift
  chroot "$root" env --ignore-environment PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C.UTF-8 \
    "${pip_environment[@]}" "$@"
}

# The files that the Dockerfile may COPY: what Dockerfile.dockerignore lets through.
context() { sed -n 's/^!//p' "$docker/Dockerfile.dockerignore"; }

# What pip was told outside holds inside as well: a mirror, an authority, wheels on the disk. Docker takes a secret for it.
pip_environment=()
while IFS= read -r line; do pip_environment+=("$line"); done < <(env | grep -E '^(PIP_[A-Z_]+|SSL_CERT_FILE)=' || true)
lend() { # lend ROOT: mounts what pip may look for
  local place
  for place in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs ${PIP_FIND_LINKS:-} ${IMAGE_LEND:-}; do
    [ -e "$place" ] || continue
    if [ -d "$place" ]; then mkdir -p "$1$place"; else mkdir -p "$(dirname "$1$place")"; touch "$1$place"; fi
    mount --bind "$place" "$1$place"
    mount -o remount,bind,ro "$1$place"
  done
  cp /etc/resolv.conf "$1/etc/resolv.conf"
  mount -t proc proc "$1/proc"
}

if [ -e "$stamp" ] && ! find $(context) -newer "$stamp" -print -quit | grep -q .; then
  echo "==> $folder is up to date"; exit 0
fi
if [ -z "${INSIDE:-}" ]; then # in mounts of its own, which end with it: nothing of the machine is mounted when this removes
  rm -rf "$folder"
  INSIDE=1 unshare --mount bash "$script" "$folder"
  rm -rf "$folder/build"
  exit
fi
mkdir -p "$folder"
echo "==> [1/4] a bare Debian 12 with Python 3.11"
debootstrap --variant=minbase --include=python3.11,python3.11-venv,python3-distutils,ca-certificates bookworm "$folder/base" \
  ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$folder/debootstrap.log"
cp --archive "$folder/base" "$folder/build"
lend "$folder/build"

mkdir -p "$folder/build/src/$docker"
cp "$docker/install.sh" "$folder/build/src/$docker/"
cp pyproject.toml constraints.txt README.md LICENSE "$folder/build/src/"
extras=$(sed -n 's/^ARG EXTRAS=//p' "$docker/Dockerfile" | sort -u)
echo "==> [2/4] packages: $extras"
in_root "$folder/build" bash -c "cd /src && bash $docker/install.sh packages '$extras'" >"$folder/packages.log" 2>&1 \
  || { tail -20 "$folder/packages.log" >&2; exit 1; }

echo "==> [3/4] flawstream"
context | tar --create --exclude=__pycache__ --exclude='*.egg-info' --files-from=- | tar --extract --directory "$folder/build/src"
in_root "$folder/build" bash -c "cd /src && bash $docker/install.sh project" >"$folder/project.log" 2>&1 \
  || { tail -20 "$folder/project.log" >&2; exit 1; }

echo "==> [4/4] the second stage: a clean Debian, the account, and /opt/flawstream"
mv "$folder/base" "$folder/root"
install "$docker/account.sh" "$folder/root/tmp/"
in_root "$folder/root" bash /tmp/account.sh
rm "$folder/root/tmp/account.sh"
rm -rf "$folder/root/opt/flawstream"
mv "$folder/build/opt/flawstream" "$folder/root/opt/flawstream"
touch "$stamp"
du --summarize --human-readable "$folder/root"
