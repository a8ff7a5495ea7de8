#!/usr/bin/env bash
# A node of a group that is not the leader: lets the leader's mpirun in, and nobody else. Keys: see docs/recipes.md.
set -euo pipefail
keys=${1:?directory with id_ed25519 and authorized_keys}
port=${2:-2222}
# mpirun's remote commands get sshd's environment, not this one.
environment="PATH=$PATH LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
[ -z "${OPAL_PREFIX:-}" ] || environment="$environment OPAL_PREFIX=$OPAL_PREFIX"
exec /usr/sbin/sshd -D -e -p "$port" \
  -o HostKey="$keys/id_ed25519" \
  -o AuthorizedKeysFile="$keys/authorized_keys" \
  -o PidFile=none -o UsePAM=no -o StrictModes=no \
  -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o PermitRootLogin=no \
  -o AllowTcpForwarding=no -o X11Forwarding=no \
  -o SetEnv="$environment"
