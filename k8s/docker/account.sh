#!/usr/bin/env bash
# Creates the image's user, and sets PATH for login shells. Needs no Docker; `make test-image` runs it too.
set -euo pipefail

groupadd --gid 10001 flawstream
useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin flawstream
# KubeRay starts Ray in a login shell, which takes its PATH from /etc/profile and not from the image.
cat > /etc/profile.d/flawstream.sh <<'SHELL'
PATH=/opt/flawstream/bin:$PATH
SHELL
mkdir --parents /data /models /opt/flawstream
